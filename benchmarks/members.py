"""Three dictionaries in one pass against three trainings one after the other, over the same rows.

    python -m benchmarks.members [--latents 4096] [--steps 40] [--rounds 2]

Makes rows (gpu_train.py), imports them, and trains one, one twice as wide and one with twice the k, as `sae-dist train`
does: reading, checksums and checkpoints included, on a GPU where there is one. A round does both ways, in an order that
alternates; seconds are those of training alone, and processor seconds, which other programs disturb less, those of
whole commands. What one pass saves is the reading: much on a GPU or from far away, little where steps take most of the
time. Writes results/members.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_train import made
from sae_dist import storage
from sae_dist.config import load
from sae_dist.service.config import TrainJob
from sae_dist.service.train_job import train_and_evaluate
from sae_dist.shards import imports
from sae_dist.shards.imports import ImportConfig

ROWS, D_MODEL, BATCH = 65_536, 768, 4096


def trained(store: Path, out: Path, steps: int, sae: dict[str, Any], *also: dict[str, Any]) -> dict[str, float]:
    """One command: seconds of training, and processor seconds of all of it."""
    values = {
        "out": str(out), "store": str(store), "sae": sae, "more_dictionaries": list(also), "order": {},
        "train": {"tokens": None, "steps": steps, "batch": BATCH, "lr": 1e-3}, "wandb": {"mode": "disabled"},
    }  # fmt: skip
    before = time.process_time()
    summary = train_and_evaluate(load(TrainJob, values), stop=lambda: False)
    assert summary is not None
    return {
        "seconds": steps * BATCH / summary["tokens_per_second"],
        "processor_s": time.process_time() - before,
    }


def both_ways(
    store: Path, folder: Path, steps: int, dictionaries: tuple[dict[str, Any], ...], *, together_first: bool
) -> dict[str, float]:
    """Tokens/s of three dictionaries at once, and of three one after the other."""
    found: dict[str, float] = {}
    for way in ("together", "apart") if together_first else ("apart", "together"):
        given = [dictionaries] if way == "together" else [(sae,) for sae in dictionaries]
        runs = [trained(store, folder / f"{way}{number}", steps, *own) for number, own in enumerate(given)]
        found[f"{way}_tokens_per_second"] = steps * BATCH / sum(run["seconds"] for run in runs)
        found[f"{way}_processor_s"] = sum(run["processor_s"] for run in runs)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "members.json")
    given = parser.parse_args()
    one = {"kind": "topk", "n_latents": given.latents, "k": 32}
    dictionaries = (one, one | {"n_latents": 2 * given.latents}, one | {"k": 64})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "rows").mkdir()
        made(ROWS, D_MODEL, folder / "rows")
        imports.import_store(storage.open(str(folder / "store")), ImportConfig(path=str(folder / "rows")))
        rounds = [
            both_ways(folder / "store", folder / str(number), given.steps, dictionaries, together_first=number % 2 == 0)
            for number in range(given.rounds)
        ]
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    result = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dictionaries": list(dictionaries), "d_model": D_MODEL, "batch": BATCH, "steps": given.steps,
        **medians,
        "speed_ratio": medians["together_tokens_per_second"] / medians["apart_tokens_per_second"],
        "processor_ratio": medians["together_processor_s"] / medians["apart_processor_s"],
        "rounds": rounds,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
