"""What each way of storing weights and moments costs: held-out FVU, seconds of a step, bytes a parameter.

    python -m benchmarks.state --cache ~/.cache/sae_dist/bench [--latents 8192] [--batch 1024] [--steps 200]

Trains all six (train.parameters x train.moments) in one pass of `sae-dist train` over real activations
(activations.py): the same rows, seed, rates and steps, each bit for bit what training it alone gives. A seventh, of
fp32 with another seed, says how far two dictionaries differ anyway. FVU is on units that training never reads. Seconds
are those of single steps on one of the batches, in rounds that take all in turn, after the first; fp32 is timed in the
kernels and in plain torch, which is what computes the others. Bytes are those of the tensors that are held from one
step to the next, without the silence counters. Writes results/state.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from sae_kernels.row_state import MomentFormat, ParameterFormat, StateOptions
from sae_kernels.shard import Backend, Shard

from benchmarks.activations import HOOK, load
from sae_dist import storage
from sae_dist.config import load as load_config
from sae_dist.service.config import TrainJob
from sae_dist.service.train_job import train_and_evaluate
from sae_dist.shards import imports
from sae_dist.shards.imports import ImportConfig

OPTIONS = [StateOptions(*both) for both in product(get_args(ParameterFormat), get_args(MomentFormat))]
PLAIN = OPTIONS[0]
HELDOUT, K = 0.1, 32


def name(state: StateOptions) -> str:
    return f"{state.parameters}, {state.moments}"


def trained(rows: Path, folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Held-out figures of every option after the same training, and of fp32 with another seed."""
    imports.import_store(storage.open(str(folder / "store")), ImportConfig(path=str(rows), heldout_fraction=HELDOUT))
    also = [{"parameters": s.parameters, "moments": s.moments, "name": f"of{n}"} for n, s in enumerate(OPTIONS) if n]
    values = {
        "out": str(folder / "out"), "store": str(folder / "store"), "order": {}, "wandb": {"mode": "disabled"},
        "sae": {"kind": "topk", "n_latents": given.latents, "k": K}, "more_dictionaries": [*also, {"seed": 1}],
        "train": {"tokens": None, "steps": given.steps, "batch": given.batch, "checkpoint_every": given.steps},
    }  # fmt: skip
    summary = train_and_evaluate(load_config(TrainJob, values), stop=lambda: False)
    assert summary is not None
    names = [*map(name, OPTIONS), "float32, float32, another seed"]
    return {of: own["eval"] for of, own in zip(names, [summary, *summary["also"]], strict=True)}


def step_of(x: torch.Tensor, n_latents: int, state: StateOptions, backend: Backend) -> Shard:
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, x.shape[1]), dim=1)
    return Shard(
        W_dec.t(), W_dec, b_enc=torch.zeros(n_latents), b_dec=x.mean(0), k=K, k_aux=0, aux_coefficient=0.0,
        dead_after_tokens=1 << 40, state=state, backend=backend,
    )  # fmt: skip


def timed(x: torch.Tensor, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step, and bytes a parameter between two, of every option; of fp32 in plain torch too."""
    cases: list[tuple[str, StateOptions, Backend]] = [(name(state), state, "auto") for state in OPTIONS]
    cases.append((f"{name(PLAIN)}, plain torch", PLAIN, "torch"))
    steps = {of: step_of(x, given.latents, state, backend) for of, state, backend in cases}
    seconds: dict[str, list[float]] = {of: [] for of in steps}
    variance = float(x.var(0).sum())
    for _ in range(given.rounds + 1):
        for of, step in steps.items():
            started = time.perf_counter()
            step.step(x, lr=1e-4, variance=variance)
            seconds[of].append(time.perf_counter() - started)
    held = {}
    for of, step in steps.items():
        tensors = step.state_dict()
        numbers = sum(tensors[parameter].numel() for parameter in ("W_enc", "W_dec", "b_enc", "b_dec"))
        counters = ("tokens_since_fired", "steps")
        held[of] = sum(tensor.nbytes for own, tensor in tensors.items() if own not in counters) / numbers
    return {of: statistics.median(own[1:]) for of, own in seconds.items()}, held


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2**17, help="activations, held-out ones included")
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "state.json")
    given = parser.parse_args()
    rows = load(given.cache, given.rows)
    x = torch.from_numpy(np.load(rows, mmap_mode="r")[: given.batch].astype(np.float32))
    seconds, held = timed(x, given)
    sys.stderr.write(f"seconds of a step: {seconds}\n")
    with tempfile.TemporaryDirectory() as place:
        judged = trained(rows, Path(place), given)
    base = name(PLAIN)
    result = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "cpu": _cpu()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "activations": {"model": "SmolLM2-135M", "hook": HOOK, "rows": given.rows, "heldout_fraction": HELDOUT},
        "n_latents": given.latents, "d_model": x.shape[1], "k": K, "batch": given.batch, "steps": given.steps,
        "options": {
            of: {
                key: own[of]
                for key, own in (("step_seconds", seconds), ("bytes_a_parameter", held))
                if of in own
            }
            | ({key: judged[of][key] for key in ("fvu", "l0", "dead_fraction", "tokens")} if of in judged else {})
            | ({"fvu_over_float32": judged[of]["fvu"] / judged[base]["fvu"]} if of in judged else {})
            | ({"step_over_float32": seconds[of] / seconds[base]} if of in seconds else {})
            for of in dict.fromkeys([*judged, *seconds])
        },
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
