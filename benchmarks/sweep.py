"""Nine points in the shared pass of a sweep against nine runs one after the other, from text to loss recovered.

    python -m benchmarks.sweep [--tokens 131072] [--epochs 2] [--keep FOLDER] [--given-store]

Both ways are commands a person types: `sae-dist sweep run ...` with three sizes and three k, and `sae-dist run ...`
nine times. Wall seconds are of the commands; processor seconds are of all their processes, Ray's too: this process
adopts those whose parents end first (PR_SET_CHILD_SUBREAPER) and waits for all. The sweep is made in the middle of the
nine runs, so that a machine with other work treats both alike. --given-store adds a third way, nine runs on the store
which the first of them harvested: how much of it is the harvest. Writes results/sweep.json.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.harvest import processor

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
LATENTS, K = (1024, 2048, 4096), (8, 16, 32)


def settings(tokens: int, epochs: int) -> list[str]:
    """Of a smaller harvest the batch, the held-out part and the text that loss recovered is measured on shrink too."""
    return [
        "model=smollm2", "hook=resid_post.9", f"harvest.tokens={tokens}", f"harvest.heldout_tokens={tokens // 8}",
        f"train.tokens={epochs * tokens}", f"train.batch={tokens // 64}", "train.lr=1e-3", "train.checkpoint_every=100",
        "order.lanes=4", f"evaluate.ce_sequences={max(tokens // 4096, 2)}", "wandb.mode=disabled",
    ]  # fmt: skip


def measured(commands: list[list[str]], log: Path) -> dict[str, float]:
    """Wall and processor seconds of commands that follow one another."""
    before, began = _spent(), time.monotonic()
    for command in commands:
        with log.open("ab") as said:
            subprocess.run([sys.executable, "-m", "sae_dist", *command], stdout=said, stderr=said, check=True)
    wall = time.monotonic() - began
    _adopted()
    return {"wall_s": round(wall, 1), "processor_s": round(_spent() - before, 1)}


def _spent() -> float:
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of_children.ru_utime + of_children.ru_stime


def _adopted() -> None:
    """Waits for processes whose parents ended first."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def figures(summaries: list[Path]) -> list[dict[str, Any]]:
    """What the points came to, to see that both ways came to the same."""
    found = [json.loads(path.read_text()) for path in summaries]
    keys = ("fvu", "l0", "loss_recovered")
    rows = [{"n_latents": one["n_latents"], "k": one["k"], **{k: one["eval"][k] for k in keys}} for one in found]
    return sorted(rows, key=lambda row: (row["n_latents"], row["k"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--given-store", action="store_true", help="also nine runs on one store")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept afterwards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sweep.json")
    given = parser.parse_args()
    assert ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0) == 0
    with tempfile.TemporaryDirectory() as place:
        folder = (given.keep or Path(place)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        keys = settings(given.tokens, given.epochs)
        grid = [f"sae.n_latents={','.join(map(str, LATENTS))}", f"sae.k={','.join(map(str, K))}"]
        points = [[f"sae.n_latents={n}", f"sae.k={k}"] for n in LATENTS for k in K]
        apart = [["run", *keys, *own, "pages=null", f"out={folder}/apart/{i}"] for i, own in enumerate(points)]
        store = f"store={folder}/apart/0/store"
        given_store = [["run", *keys, *own, "pages=null", store, f"out={folder}/given/{i}"]
                       for i, own in enumerate(points)]  # fmt: skip
        half = len(apart) // 2
        parts = [measured(apart[:half], folder / "apart.log")]
        sweep = measured([["sweep", "run", *keys, *grid, f"out={folder}/sweep"]], folder / "sweep.log")
        parts.append(measured(apart[half:], folder / "apart.log"))
        found = {"sweep": sweep, "nine runs": {key: round(sum(part[key] for part in parts), 1) for key in sweep}}
        if given.given_store:
            found["nine runs on one store"] = measured(given_store, folder / "given.log")
        same = figures(sorted((folder / "sweep").glob("points/*/summary.json")))
        assert same == figures(sorted((folder / "apart").glob("*/summary.json"))), "the dictionaries differ"
    ratios = {
        way: {key: round(found[way][key] / found["sweep"][key], 2) for key in ("wall_s", "processor_s")}
        for way in found
        if way != "sweep"
    }
    result = {
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__},
        "load": round(os.getloadavg()[2], 1), "settings": keys, "n_latents": LATENTS, "k": K,
        "seconds": found, "times_the_sweep": ratios, "points": same,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
