"""What trackers cost a training step, at work and broken: `python -m benchmarks.monitor [steps] [repeats]`.

Each state is timed against a run without trackers that is made right after it, in turns: median seconds of a step, and
processor seconds of a step in the training's own process, which other work on the machine disturbs less. States: at
work, killed in the middle of the run, on a full disk (needs root), a server that never answers. Of the killed ones the
steps before and after it are compared as well.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from sae_dist.cli.main import main as sae_dist
from sae_dist.monitor.metrics import read_metrics

RESULT = Path(__file__).parent / "results" / "monitor.json"
BATCH, D_MODEL, N_LATENTS, K, LOG_EVERY = 1024, 256, 4096, 16, 5
TRACKED = ["wandb.mode=offline", "tensorboard=true"]


def make_store(place: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((50_000, D_MODEL), dtype=np.float32)
    np.save(place / "rows.npy", rows)
    assert sae_dist(["store", "import", f"path={place}/rows.npy", f"store={place}/store", "heldout_fraction=0.01"]) == 0


class Timed(NamedTuple):
    """Median seconds of a step, of the steps before and after the middle, and processor seconds of one."""

    wall: float
    before: float
    after: float
    processor: float


def train(place: Path, name: str, steps: int, *keys: str, environment: dict[str, str] | None = None) -> Timed:
    """A whole run as a command."""
    out, said = place / name, place / f"{name}.log"
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sae_dist", "train", f"store={place}/store", f"out={out}",
             f"sae.n_latents={N_LATENTS}", f"sae.k={K}", f"train.steps={steps}", f"train.batch={BATCH}",
             f"train.log_every={LOG_EVERY}", f"train.checkpoint_every={steps}", *keys],
            env=os.environ | (environment or {}), stderr=log, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    used = samples(process, out / "metrics.jsonl", steps, kill=name.startswith("killed"))
    assert process.returncode == 0, said.read_text()
    lines = read_metrics(out / "metrics.jsonl")
    assert len(lines) == steps // LOG_EVERY
    return timed(lines, used, steps)


def samples(process: subprocess.Popen[bytes], metrics: Path, steps: int, *, kill: bool) -> list[tuple[int, float]]:
    """Steps done and processor seconds of the process alone, while it trains. `kill`: its trackers, in the middle."""
    found = list[tuple[int, float]]()
    while process.poll() is None:
        done = read_metrics(metrics)[-1]["step"] if metrics.exists() and read_metrics(metrics) else 0
        with suppress(psutil.Error):
            times = psutil.Process(process.pid).cpu_times()
            if 0 < done < steps and (not found or found[-1][0] != done):
                found.append((done, times.user + times.system))
            if kill and done >= steps // 2:
                kill = not kill_trackers(process.pid)
        time.sleep(0.1)
    assert not kill, "W&B had not begun before the run was over; give it more steps"
    return found


def kill_trackers(of: int) -> bool:
    """W&B, its service and TensorBoard's process, once they have begun; whether they had."""
    children = psutil.Process(of).children(recursive=True)
    begun = any("wandb-core" in child.name() for child in children)
    for child in children if begun else ():
        child.send_signal(signal.SIGKILL)
    return begun


def timed(lines: list[dict], used: list[tuple[int, float]], steps: int) -> Timed:
    """After the first quarter of the steps, in which trackers start as well."""
    each = [
        (b["step"], (b["time"] - a["time"]) / LOG_EVERY) for a, b in pairwise(lines) if a["step"] >= steps // 4
    ]  # fmt: skip
    (first, began), *_, (last, ended) = [sample for sample in used if sample[0] >= steps // 4]
    before, after = ([took for step, took in each if (step > steps // 2) == late] for late in (False, True))
    wall, first_half, second_half = (statistics.median(part) for part in ([took for _, took in each], before, after))
    return Timed(wall, first_half, second_half, (ended - began) / (last - first))


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    with ExitStack() as mounted:
        for name in ("wandb", "tensorboard"):
            (out / name).mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out / name)], check=True)
            mounted.callback(subprocess.run, ["umount", "-l", str(out / name)], check=True)
        yield


def measure(place: Path, state: str, number: int, steps: int) -> Timed:
    name = f"{state}-{number}"
    match state:
        case "none":
            return train(place, name, steps, "wandb.mode=disabled")
        case "disk_full":
            with full_disk(place / name):
                return train(place, name, steps, *TRACKED)
        case "no_answer":
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
                unreachable = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
                return train(place, name, steps, "wandb.mode=online", environment=unreachable)
        case _:
            return train(place, name, steps, *TRACKED)


def main() -> None:
    steps, repeats = (int(given) for given in (*sys.argv[1:], "600", "3")[:2])
    states = ["at_work", "killed", *(["disk_full"] if os.geteuid() == 0 else []), "no_answer"]
    found: dict[str, list[Timed]] = {state: [] for state in ["none", *states]}
    ratios: dict[str, list[tuple[float, float]]] = {state: [] for state in states}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_store(place)
        for number in range(repeats):
            for state in states:
                found[state].append(measure(place, state, number, steps))
                found["none"].append(measure(place, "none", len(found["none"]), steps))
                with_it, without = found[state][-1], found["none"][-1]
                ratios[state].append((with_it.wall / without.wall, with_it.processor / without.processor))
                wall, processor = ratios[state][-1]
                print(f"{state:<10} {with_it.wall:.5f} s a step; of that without: wall {wall:.3f}, own {processor:.3f}")
    result = {
        "what": "seconds of a training step with trackers over those without, medians of pairs that are made in turns",
        "steps": steps, "repeats": repeats, "batch": BATCH, "d_model": D_MODEL, "n_latents": N_LATENTS, "k": K,
        "log_every": LOG_EVERY, "cpus": len(os.sched_getaffinity(0)),
        "load": {"at_the_start": round(load, 1), "at_the_end": round(os.getloadavg()[0], 1)},
        "step_seconds": {state: median(each, "wall") for state, each in found.items()},
        "step_processor_seconds": {state: median(each, "processor") for state, each in found.items()},
        "wall_ratio": {state: round(statistics.median(w for w, _ in each), 4) for state, each in ratios.items()},
        "processor_ratio": {state: round(statistics.median(p for _, p in each), 4) for state, each in ratios.items()},
        "killed_step_seconds": {"before": median(found["killed"], "before"), "after": median(found["killed"], "after")},
        "ratios": {state: [[round(one, 4) for one in pair] for pair in each] for state, each in ratios.items()},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def median(each: list[Timed], figure: str) -> float:
    return round(statistics.median(getattr(one, figure) for one in each), 5)


if __name__ == "__main__":
    main()
