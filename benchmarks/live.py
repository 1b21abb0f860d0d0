"""Training on a store while a harvest fills it: how much longer than the slower of both alone, and memory over time.

    python -m benchmarks.live [--cases overlap slow_reader slow_producer] [--seconds 600]

Harvest and training are the two commands, each held to a core of its own (Ray and all that it starts included).

- `overlap`: `sae-dist harvest` alone, then `sae-dist train` alone on its store, then both at once on a new store
  (`train live=true`, started when the store is there). Wall time of the commands, imports and Ray's start included.
- `slow_reader`, `slow_producer`: both at once for `--seconds`, with a dictionary so large, or so small, that one side
  is several times slower than the other; `harvest.ahead_units` bounds the distance and consumed units are deleted.
  Private memory of all processes of each side and the size of the store, every two seconds.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harvest import processor

SAE = [sys.executable, "-m", "sae_dist"]
HARVEST, TRAIN = ["taskset", "-c", "0", *SAE, "harvest"], ["taskset", "-c", "1", *SAE, "train"]
UNIT = 64 * 128  # positions
AHEAD = 8  # units


def harvest(folder: Path, tokens: int, *more: str) -> subprocess.Popen[bytes]:
    settings = [f"harvest.tokens={tokens}", "harvest.heldout_tokens=8192", "harvest.threads=1", "wandb.mode=disabled"]
    return _start(
        [*HARVEST, f"store={folder}/store", f"out={folder}/harvest", *settings, *more], folder / "harvest.log"
    )


def train(folder: Path, tokens: int, latents: int, *more: str) -> subprocess.Popen[bytes]:
    settings = [f"train.tokens={tokens}", f"sae.n_latents={latents}", "train.batch=2048", "train.init_rows=4096",
                "train.threads=1", "order.round_units=2", "train.checkpoint_every=20", "train.log_every=5",
                "wandb.mode=disabled"]  # fmt: skip
    return _start([*TRAIN, f"store={folder}/store", f"out={folder}/train", *settings, *more], folder / "train.log")


def overlap(folder: Path, units: int, latents: int) -> dict[str, Any]:
    """Seconds of both commands alone and together."""
    tokens, rows = units * UNIT, int(units * UNIT * 0.97)  # rows of one pass: first positions and separators are none
    seconds = {}
    alone, together = folder / "alone", folder / "together"
    began = time.monotonic()
    _finish(harvest(alone, tokens))
    seconds["harvest"] = time.monotonic() - began
    began = time.monotonic()
    _finish(train(alone, rows, latents))
    seconds["train"] = time.monotonic() - began
    began = time.monotonic()
    producer = harvest(together, tokens)
    _wait_for_store(together, producer)
    reader = train(together, rows, latents, "live=true")
    _finish(producer)
    seconds["harvest, both at work"] = time.monotonic() - began
    _finish(reader)
    seconds["both"] = time.monotonic() - began
    hashes = [json.loads((f / "train" / "summary.json").read_text())["order_hash"] for f in (alone, together)]
    assert hashes[0] == hashes[1], "the live training saw other rows"
    return {
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "of the slower alone (at most 1.15)": round(seconds["both"] / max(seconds["harvest"], seconds["train"]), 3),
    }


def side_by_side(folder: Path, latents: int, seconds: float) -> dict[str, Any]:
    """Memory and the store's size while both sides work for `seconds`, then are asked to stop."""
    flow = [f"harvest.ahead_units={AHEAD}", "harvest.retention=until_consumed"]
    producer = harvest(folder, 400 * UNIT, *flow)
    _wait_for_store(folder, producer)
    reader = train(folder, 390 * UNIT, latents, "live=true")
    samples, began = [], time.monotonic()
    while time.monotonic() - began < seconds and producer.poll() is None and reader.poll() is None:
        samples.append({
            "at_s": round(time.monotonic() - began, 1), "harvest_mb": _private(producer), "train_mb": _private(reader),
            "store_mb": _stored(folder / "store"),
        })  # fmt: skip
        time.sleep(2)
    ended = {"harvest": producer.poll(), "train": reader.poll()}
    for process in (producer, reader):
        process.send_signal(signal.SIGTERM)
    for process in (producer, reader):
        process.wait(timeout=120)
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    third = len(samples) // 3

    def middle(key: str, part: list[dict[str, Any]]) -> float:
        return round(statistics.median(sample[key] for sample in part))

    return {
        "latents": latents,
        "seconds": samples[-1]["at_s"],
        "ended_early": {side: code for side, code in ended.items() if code is not None},
        "trained_rows": lines[-1]["tokens"],
        **{
            key: {
                "most": max(sample[key] for sample in samples),
                "second third": middle(key, samples[third : 2 * third]),
                "last third": middle(key, samples[2 * third :]),
            }
            for key in ("harvest_mb", "train_mb", "store_mb")
        },
        "last": lines[-1],
    }


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_WAIT_POLICY": "passive"})


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")


def _wait_for_store(folder: Path, producer: subprocess.Popen[bytes]) -> None:
    while not (folder / "store" / "store.json").exists():
        if producer.poll() is not None:
            raise RuntimeError(f"the harvest ended: {(folder / 'harvest.log').read_text()[-2000:]}")
        time.sleep(0.1)


def _private(process: subprocess.Popen[bytes]) -> int:
    """Private memory of a process and all that it started, MB."""
    total, parent = 0, psutil.Process(process.pid)
    for each in (parent, *parent.children(recursive=True)):
        try:
            total += each.memory_full_info().uss
        except psutil.Error:
            continue  # it has just ended
    return total >> 20


def _stored(store: Path) -> int:
    """Size of the store's shards, MB."""
    total = 0
    for path in store.glob("data/**/*.arrow"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # consumed and deleted meanwhile
    return total >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ("overlap", "slow_reader", "slow_producer")
    parser.add_argument("--cases", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--units", type=int, default=16, help="overlap: units of 8,192 positions")
    parser.add_argument("--latents", type=int, default=12288, help="overlap: of the dictionary")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/live.json"))
    arguments = parser.parse_args()
    for case in arguments.cases:
        before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="live-", ignore_cleanup_errors=True) as place:
            folder = Path(place)
            if case == "overlap":
                measured = overlap(folder, arguments.units, arguments.latents)
            else:
                measured = side_by_side(folder, 131072 if case == "slow_reader" else 1024, arguments.seconds)
        result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        machine = {"processor": processor(), "cores": os.cpu_count(), "load_before": round(before, 2)}
        result[case] = {"machine": machine, **measured}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        sys.stderr.write(f"{case}: {json.dumps(measured)}\n")


if __name__ == "__main__":
    main()
