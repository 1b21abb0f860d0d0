"""The main job as a command in a process of its own, with a tiny random model, and what it has done so far."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sae_dist.monitor.metrics import read_metrics

DEADLINE_S = 1200


def command(out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "sae_dist", "run", "preset=tiny", f"out={out}", "wandb.mode=disabled", *overrides]


def start(out: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(out, *overrides), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, said
    return said


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def units(out: Path) -> int:
    return len(list((out / "store" / "commit").glob("*.json")))


def has_checkpoint(out: Path) -> bool:
    """Whether one is complete: its folder is there before."""
    return any((out / "checkpoints").glob("step_*/checkpoint.json"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def order_hashes(out: Path) -> dict[int, str]:
    return {line["step"]: line["order_hash"] for line in read_metrics(out / "metrics.jsonl")}
