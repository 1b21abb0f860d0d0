"""Quality of every kind of dictionary in worlds whose features are known.

    python -m benchmarks.quality [--worlds independent,hierarchy] [--steps 3000] [--seeds 1] [--data-weight 0.8]

All kinds of a world learn in one pass over the same rows, by the code of `sae-dist store import` and `sae-dist train`.
Kinds whose number of active latents follows from a coefficient are trained with several; the table has the one whose
L0 on held-out rows is nearest to the world's. Writes results/quality_worlds.json and prints a table.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harvest import processor
from benchmarks.truth import Found, judge
from benchmarks.worlds import L0, WORLDS, World, world
from sae_dist import storage
from sae_dist.config import load
from sae_dist.sae import dictionary
from sae_dist.service.config import TrainJob
from sae_dist.service.train_job import train_and_evaluate
from sae_dist.shards import imports
from sae_dist.shards.imports import ImportConfig

ROWS, BATCH, HELDOUT = 500_000, 512, 8_192
N_LATENTS, K = 512, int(L0)
KINDS: dict[str, list[dict[str, Any]]] = {
    "topk": [{}],
    "batchtopk": [{}],
    "multi_topk": [{}],
    "abs_topk": [{}],
    "matryoshka": [{}],
    "matryoshka_topk": [{}],
    "jumprelu": [{}],
    "relu": [{"l1_coefficient": c} for c in (1.0, 2.0, 4.0)],
    "relu_norm": [{"l1_coefficient": c} for c in (2.0, 4.0, 8.0)],
    "p_anneal": [{"l1_coefficient": c} for c in (0.5, 1.0, 2.0)],
    "gated": [{"l1_coefficient": c} for c in (1.0, 2.0, 4.0)],
    "jumprelu_tanh": [{"tanh_coefficient": c} for c in (2.0, 4.0, 8.0)],
}


def entries() -> list[dict[str, Any]]:
    """more_dictionaries: every kind and coefficient but the main one, TopK."""
    return [
        {"kind": kind, "name": f"{kind}-{number}", **options}
        for kind, choices in KINDS.items()
        for number, options in enumerate(choices)
        if kind != "topk"
    ]


def train(store: Path, out: Path, steps: int, *, seed: int, data_weight: float | None) -> None:
    values = {
        "out": str(out), "store": str(store), "seed": seed, "more_dictionaries": entries(), "order": {},
        "sae": {"kind": "topk", "n_latents": N_LATENTS, "k": K, "dead_after_tokens": 200_000},
        "train": {"tokens": None, "steps": steps, "batch": BATCH, "checkpoint_every": 10_000, "threads": 1,
                  "init_data_weight": data_weight},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    assert train_and_evaluate(load(TrainJob, values), stop=lambda: False) is not None


def of_world(
    name: str, steps: int, *, seed: int, data_weight: float | None, folder: Path
) -> dict[str, dict[str, float | None]]:
    """The figures of every kind, by name."""
    known = world(name)
    np.save(folder / "rows.npy", known.rows(ROWS, seed=100 + seed).x.numpy())
    store, out = folder / "store", folder / "run"
    source = ImportConfig(path=str(folder / "rows.npy"), heldout_fraction=0.02)
    imports.import_store(storage.open(str(store)), source)
    train(store, out, steps, seed=seed, data_weight=data_weight)
    heldout = known.rows(HELDOUT, seed=1)
    found = {kind: _nearest(known, heldout, out, kind) for kind in KINDS}
    for kind, one in found.items():
        print(
            f"{name:12} {kind:16}", "  ".join(f"{key} {value:.3f}" for key, value in one.items() if value is not None)
        )
    return found


def _nearest(known: World, heldout: Any, out: Path, kind: str) -> dict[str, float | None]:
    """Of a kind's coefficients, the figures of the one whose L0 is nearest to the world's."""
    folders = [out / "dictionary"]
    if kind != "topk":
        folders = [out / "dictionaries" / f"{kind}-{number}" for number in range(len(KINDS[kind]))]
    found: list[tuple[Found, dict[str, Any]]] = [
        (judge(dictionary.load(folder), known, heldout), options)
        for folder, options in zip(folders, KINDS[kind], strict=True)
    ]
    nearest, options = min(found, key=lambda one: abs(one[0].l0 - L0))
    return nearest._asdict() | options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data-weight", type=float, help="train.init_data_weight, if not the default")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "quality_worlds.json")
    given, began = parser.parse_args(), time.monotonic()
    about = {
        "command": "python -m benchmarks.quality", "n_true": 256, "d_model": 64, "n_latents": N_LATENTS, "k": K,
        "steps": given.steps, "init_data_weight": given.data_weight,
        "batch": BATCH, "rows": ROWS, "machine": processor(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name in given.worlds.split(","):
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                figures = of_world(name, given.steps, seed=seed, data_weight=given.data_weight, folder=place)
                for kind, one in figures.items():
                    found.setdefault(name, {}).setdefault(kind, []).append(one)
        seconds = round(time.monotonic() - began)  # what is done is kept
        given.result.write_text(json.dumps({"about": about | {"seconds": seconds}, "worlds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
