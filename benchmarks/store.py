"""How fast the activation store writes, verifies and reads, beside raw files and other formats, on the same bytes.

    python benchmarks/store.py --gigabytes 2 --read-gigabytes 10
    python benchmarks/store.py --folder /data/bench --parts write read      and later --parts disk memory peer

`read` is out of the page cache: it measures code and memory. `read_disk` evicts the files first. MosaicML Streaming
is installed into an environment of its own, which is deleted afterwards.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
import xxhash

from sae_dist import storage
from sae_dist.shards import stores, verify, writer
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader

WIDTH, UNIT_ROWS, SLICE_ROWS, BATCH, HOOK = 4096, 16_384, 1024, 4096, "resid_post.0"  # slices of 8 MiB
UNIT_BYTES = WIDTH * UNIT_ROWS * 2
PARTS = ("write", "read", "disk", "memory", "peer")
RAW, OURS = "file + xxh3-128", "sae_dist, shuffled batches, verified"
PEER = "mosaicml-streaming==0.13.0"


def unit_bits(base: np.ndarray, unit: int) -> np.ndarray:
    """The same bytes for every format: Gaussian bfloat16, turned by a few rows from unit to unit."""
    return np.roll(base, 17 * unit, axis=0)


def timed(work: Callable[[], object], n_bytes: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"gb_per_s": n_bytes / 1e9 / wall, "cpu_s_per_gb": cpu / (n_bytes / 1e9)}


def repeated(name: str, works: dict[str, Callable[[], object]], n_bytes: int, repeats: int) -> dict[str, object]:
    """Each work `repeats` times, taking turns, so that a noisy minute hits all alike; medians and the best."""
    runs: dict[str, list[dict[str, float]]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            runs[key].append(timed(work, n_bytes))
    result = {}
    for key, figures in runs.items():
        result[key] = {
            "gb_per_s": round(statistics.median(f["gb_per_s"] for f in figures), 3),
            "gb_per_s_best": round(max(f["gb_per_s"] for f in figures), 3),
            "cpu_s_per_gb": round(statistics.median(f["cpu_s_per_gb"] for f in figures), 3),
        }
        sys.stderr.write(f"{name:8s} {key:32s} {result[key]}\n")
    return result


def write_all(folder: Path, base: np.ndarray, units: int) -> dict[str, object]:
    ids = np.arange(UNIT_ROWS)
    store = writer.create(storage.open(folder / "ours"), StoreMeta(
        model="benchmark", hooks={HOOK: WIDTH}, n_units=units, unit_rows=UNIT_ROWS, slice_rows=SLICE_ROWS))  # fmt: skip
    for name in ("raw", "parquet", "safetensors"):
        (folder / name).mkdir()

    def ours() -> None:
        for unit in range(units):
            x = torch.from_numpy(unit_bits(base, unit)).view(torch.bfloat16)
            writer.write_unit(store, unit, {HOOK: x}, doc=ids, pos=ids, token=ids)

    def raw() -> None:
        for unit in range(units):
            with (folder / "raw" / f"{unit}").open("wb") as file:
                unit_bits(base, unit).tofile(file)
                file.flush()
                os.fsync(file.fileno())

    def parquet() -> None:
        for unit in range(units):
            values = pa.Array.from_buffers(pa.uint16(), WIDTH * UNIT_ROWS, [None, pa.py_buffer(unit_bits(base, unit))])
            table = pa.table({"act": pa.FixedSizeListArray.from_arrays(values, WIDTH)})
            pq.write_table(
                table, folder / "parquet" / f"{unit}", compression="none", use_dictionary=False,
                write_page_checksum=True, row_group_size=SLICE_ROWS,
            )  # fmt: skip

    def tensors() -> None:
        for unit in range(units):
            x = torch.from_numpy(unit_bits(base, unit)).view(torch.bfloat16)
            safetensors.torch.save_file({"act": x}, folder / "safetensors" / f"{unit}")

    names = {"file, flushed to disk": raw, "sae_dist (statistics, hashes, flushed)": ours, "parquet": parquet,
             "safetensors": tensors}  # fmt: skip
    return {key: repeated("write", {key: work}, units * UNIT_BYTES, 1)[key] for key, work in names.items()}


def raw_ways(folder: Path, units: int) -> dict[str, Callable[[], object]]:
    """Two ways to read and hash plain files, either of which may be the faster one: the goals take the better."""
    room = memoryview(bytearray(UNIT_BYTES))

    def read(step: int) -> None:
        for unit in range(units):
            whole = xxhash.xxh3_128()
            with (folder / "raw" / f"{unit}").open("rb", buffering=0) as file:
                for _ in range(0, UNIT_BYTES, step):
                    assert file.readinto(room[:step]) == step
                    whole.update(room[:step])
            whole.digest()

    return {f"{RAW}, a file at a time": lambda: read(UNIT_BYTES), f"{RAW}, 8 MiB at a time": lambda: read(8 << 20)}


def read_all(folder: Path, units: int, repeats: int) -> dict[str, object]:
    store = stores.open(storage.open(folder / "ours"))
    target = torch.empty(BATCH, WIDTH, dtype=torch.int16)

    def copied() -> None:
        for unit in range(units):
            subprocess.run(["cp", folder / "raw" / f"{unit}", folder / "copy"], check=True)

    # One loader, epoch after epoch: opened once, as in training. Little is read ahead while others are measured.
    batches = Loader(store, hooks=Hooks((HOOK,)), batch=BATCH, seed=0, reuse_buffers=True, prefetch=1)

    def loader() -> None:
        for _ in itertools.islice(batches, units * UNIT_ROWS // BATCH):
            pass

    def slices() -> None:
        for unit in range(units):
            for index in range(len(store.commit(unit).shards[HOOK].slices)):
                store.read_slice(HOOK, unit, index)

    def parquet() -> None:
        for unit in range(units):
            file = pq.ParquetFile(folder / "parquet" / f"{unit}", page_checksum_verification=True)
            for part in file.iter_batches(batch_size=BATCH):
                np.copyto(
                    target.numpy().view(np.uint16)[: len(part)], part["act"].flatten().to_numpy().reshape(-1, WIDTH)
                )

    def tensors() -> None:
        for unit in range(units):
            with safetensors.safe_open(folder / "safetensors" / f"{unit}", framework="pt") as file:
                part = file.get_slice("act")
                for start in range(0, UNIT_ROWS, BATCH):
                    target.copy_(part[start : start + BATCH].view(torch.int16))

    works = {
        **raw_ways(folder, units),
        OURS: loader,
        "sae_dist, slices mapped and verified": slices,
        "sae_dist, store verify": lambda: verify.verify(store),
        "cp (reads and writes)": copied,
        "parquet, in order, page crc32": parquet,
        "safetensors, in order, unverified": tensors,
    }
    for work in works.values():
        work()  # everything into the page cache
    result = repeated("read", works, units * UNIT_BYTES, repeats)
    batches.close()
    return result


def read_disk(folder: Path, units: int, repeats: int) -> dict[str, object]:
    """Raw files and the loader with cold files: what the disk lets through."""
    store = stores.open(storage.open(folder / "ours"))

    def loader() -> None:
        steps = units * UNIT_ROWS // BATCH  # every row once, as the plain files are read
        with Loader(store, hooks=Hooks((HOOK,)), batch=BATCH, seed=0, reuse_buffers=True, stop_step=steps) as batches:
            for _ in batches:
                pass

    works = {**raw_ways(folder, units), OURS: loader}
    runs: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            for path in folder.glob("**/*"):
                if path.is_file() and path.stat().st_size > 1 << 20:
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            runs[key].append(round(timed(work, units * UNIT_BYTES)["gb_per_s"], 3))
    result = {key: {"gb_per_s": statistics.median(figures), "runs": figures} for key, figures in runs.items()}
    sys.stderr.write(f"disk     {result}\n")
    return result


def memory_over(folder: Path, n_bytes: int) -> dict[str, object]:
    """Resident and private memory of this process while a loader reads `n_bytes`, epoch after epoch."""
    store, process, samples = stores.open(storage.open(folder / "ours")), psutil.Process(), []
    every = 1 << 30
    with Loader(store, hooks=Hooks((HOOK,)), batch=BATCH, seed=0, reuse_buffers=True) as batches:
        read = 0
        for batch in batches:
            read += batch.x.nbytes
            if read // every > len(samples):
                usage = process.memory_full_info()
                samples.append(
                    {"read_gb": round(read / 1e9, 1), "rss_mb": usage.rss >> 20, "private_mb": usage.uss >> 20}
                )
            if read >= n_bytes:
                break
    early, late = samples[1 : len(samples) // 2], samples[len(samples) // 2 :]
    growth = statistics.mean(s["rss_mb"] for s in late) - statistics.mean(s["rss_mb"] for s in early)
    return {"samples": samples, "rss_growth_mb": round(growth)}


def mosaic(folder: Path, units: int, repeats: int) -> dict[str, object]:
    """MosaicML Streaming on the same rows, in a fresh environment of its own."""
    uv, python = Path(sys.executable).with_name("uv"), folder / "peer" / "bin" / "python"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder / "peer"], check=True)
    subprocess.run(
        [uv, "pip", "install", "-q", "--python", python, PEER, f"torch=={torch.__version__.split('+')[0]}"], check=True
    )
    # The torchvision that comes along is built for another torch and fails on import; Streaming wants these names only.
    stub = folder / "stub" / "torchvision"
    (stub / "transforms").mkdir(parents=True, exist_ok=True)
    for name, text in {
        "__init__.py": "",
        "datasets.py": "class VisionDataset: pass\n",
        "transforms/__init__.py": "",
        "transforms/functional.py": "to_tensor = None\n",
    }.items():
        (stub / name).write_text(text)
    script = Path(__file__).with_name("store_mosaic.py")
    arguments = [str(folder / "raw"), str(folder / "mds"), str(units), str(WIDTH), str(repeats)]
    done = subprocess.run([python, script, *arguments], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(stub.parent)})  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def goals(result: dict) -> dict[str, float]:
    """The figures that are asked for, out of the parts that have been measured."""
    found = {}
    for part, place in (("read_disk", "on disk (at least 0.8)"), ("read", "in the page cache")):
        if part in result:
            raw = max(figures["gb_per_s"] for key, figures in result[part].items() if key.startswith(RAW))
            found[f"share of raw verified read, files {place}"] = round(result[part][OURS]["gb_per_s"] / raw, 3)
    if "read" in result:
        found["cpu_s_per_gb read (at most 1.2)"] = result["read"][OURS]["cpu_s_per_gb"]
    if "memory" in result:
        found["rss_growth_mb over the read (flat)"] = result["memory"]["rss_growth_mb"]
    return found


def measure(part: str, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """One part of the benchmark; `write` makes the files that all others read."""
    units = max(int(arguments.gigabytes * 1e9 / UNIT_BYTES), 2)
    match part:
        case "write":
            generator = torch.Generator().manual_seed(0)
            rows = torch.randn(UNIT_ROWS, WIDTH, generator=generator).bfloat16()
            return {"bytes": units * UNIT_BYTES, "write": write_all(folder, rows.view(torch.uint16).numpy(), units)}
        case "read":
            return {"read": read_all(folder, units, arguments.repeats)}
        case "disk":
            return {"read_disk": read_disk(folder, units, 3 * arguments.repeats)}
        case "memory":
            return {"memory": memory_over(folder, int(arguments.read_gigabytes * 1e9))}
        case _:
            return {"mosaicml_streaming": mosaic(folder, units, arguments.repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--read-gigabytes", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="keep the files here, to measure other parts on them later")
    arguments = parser.parse_args()
    fresh = "write" in arguments.parts or not arguments.out.exists()
    result = {} if fresh else json.loads(arguments.out.read_text())
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts:
            before = os.getloadavg()[0]
            result |= measure(part, folder, arguments)
            load = result.get("load", {}) | {part: [round(before, 2), round(os.getloadavg()[0], 2)]}
            machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
                       "pyarrow": pa.__version__}  # fmt: skip
            result |= {"machine": machine, "load": load, "width": WIDTH, "goals": goals(result)}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stderr.write(json.dumps(result["goals"], indent=1) + "\n")


if __name__ == "__main__":
    main()
