"""What trackers cost a training step, at work and broken: `python -m benchmarks.monitor [steps] [repeats]`.

Each state is timed against a run without trackers that is made right beside it, in turns: median seconds of a step, and
the ratio of each pair. States: at work, killed once they have begun, on a full disk (needs root), a server that never
answers.
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
from contextlib import ExitStack, contextmanager
from pathlib import Path

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


def train(place: Path, name: str, steps: int, *keys: str, environment: dict[str, str] | None = None) -> Path:
    """A whole run as a command; its folder."""
    out = place / name
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_dist", "train", f"store={place}/store", f"out={out}", f"sae.n_latents={N_LATENTS}",
         f"sae.k={K}", f"train.steps={steps}", f"train.batch={BATCH}", f"train.log_every={LOG_EVERY}",
         f"train.checkpoint_every={steps}", *keys],
        env=os.environ | (environment or {}), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    if name.startswith("killed"):
        kill_trackers(process)
    _, said = process.communicate(timeout=3600)
    assert process.returncode == 0, said
    assert len(read_metrics(out / "metrics.jsonl")) == steps // LOG_EVERY
    return out


def kill_trackers(process: subprocess.Popen[str]) -> None:
    """Once W&B has begun: it, its service and TensorBoard's process."""
    while process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        if any("wandb-core" in child.name() for child in children):
            for child in children:
                child.send_signal(signal.SIGKILL)
            return
        time.sleep(0.05)


def step_seconds(out: Path) -> float:
    """Median over the lines after the first fifth, in which trackers start as well."""
    lines = read_metrics(out / "metrics.jsonl")
    lines = lines[len(lines) // 5 :]
    return statistics.median((b["time"] - a["time"]) / LOG_EVERY for a, b in zip(lines, lines[1:], strict=False))


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    with ExitStack() as mounted:
        for name in ("wandb", "tensorboard"):
            (out / name).mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out / name)], check=True)
            mounted.callback(subprocess.run, ["umount", "-l", str(out / name)], check=True)
        yield


def measure(place: Path, state: str, number: int, steps: int) -> float:
    name = f"{state}-{number}"
    match state:
        case "none":
            return step_seconds(train(place, name, steps, "wandb.mode=disabled"))
        case "disk_full":
            with full_disk(place / name):
                return step_seconds(train(place, name, steps, *TRACKED))
        case "no_answer":
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
                unreachable = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
                return step_seconds(train(place, name, steps, "wandb.mode=online", environment=unreachable))
        case _:
            return step_seconds(train(place, name, steps, *TRACKED))


def main() -> None:
    steps, repeats = (int(given) for given in (*sys.argv[1:], "600", "3")[:2])
    states = ["at_work", "killed", *(["disk_full"] if os.geteuid() == 0 else []), "no_answer"]
    seconds: dict[str, list[float]] = {state: [] for state in ["none", *states]}
    ratios: dict[str, list[float]] = {state: [] for state in states}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_store(place)
        for number in range(repeats):
            for state in states:
                alone = measure(place, "none", len(seconds["none"]), steps)
                seconds["none"].append(alone)
                seconds[state].append(measure(place, state, number, steps))
                ratios[state].append(seconds[state][-1] / alone)
                print(f"{state:<10} {seconds[state][-1]:.5f} s, without {alone:.5f} s: {ratios[state][-1]:.3f}")
    found = {
        "what": "median seconds of a training step with trackers over those without, in turns",
        "steps": steps, "repeats": repeats, "batch": BATCH, "d_model": D_MODEL, "n_latents": N_LATENTS, "k": K,
        "log_every": LOG_EVERY, "cpus": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[2], 1),
        "step_seconds": {state: round(statistics.median(each), 5) for state, each in seconds.items()},
        "ratio": {state: round(statistics.median(each), 4) for state, each in ratios.items()},
        "ratios": {state: [round(one, 4) for one in each] for state, each in ratios.items()},
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
