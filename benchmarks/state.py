"""What each way of storing weights and moments costs: held-out FVU, seconds of a step, bytes a parameter.

    python -m benchmarks.state --cache ~/.cache/sae_dist/bench [--latents 8192] [--batch 1024] [--steps 200]
    python -m benchmarks.state --cache ~/.cache/sae_dist/bench --times 16384 65536 --batch 4096

Trains all six (train.parameters x train.moments) in one pass of `sae-dist train` over real activations
(activations.py): the same rows, seed, rates and steps, each bit for bit what training it alone gives. A seventh, of
fp32 with another seed, says how far two dictionaries differ anyway. FVU is on units that training never
reads. Writes results/state.json.

With `--times`, single steps of dictionaries of those sizes instead, on one batch, in rounds that take all six in turn:
medians over rounds, after the first, of seconds and of each round's ratio to fp32, in wall seconds and in processor
seconds of all threads, which other programs on the machine disturb less. Bytes are those of the tensors that are held
from one step to the next, without the silence counters. Writes results/state_times.json.
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
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from sae_kernels.row_state import MomentFormat, ParameterFormat, StateOptions
from sae_kernels.shard import Shard

from benchmarks.activations import HOOK, load
from benchmarks.kernels import features
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


class Seconds(NamedTuple):
    wall: float
    processor: float


def step_of(x: torch.Tensor, n_latents: int, state: StateOptions) -> Shard:
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, x.shape[1]), dim=1)
    return Shard(
        W_dec.t(), W_dec, b_enc=torch.zeros(n_latents), b_dec=x.mean(0), k=K, k_aux=0, aux_coefficient=0.0,
        dead_after_tokens=1 << 40, state=state,
    )  # fmt: skip


def held(step: Shard) -> float:
    """Bytes a parameter between two steps."""
    tensors = step.state_dict()
    numbers = sum(tensors[parameter].numel() for parameter in ("W_enc", "W_dec", "b_enc", "b_dec"))
    counters = ("tokens_since_fired", "steps")
    return sum(tensor.nbytes for own, tensor in tensors.items() if own not in counters) / numbers


def timed(x: torch.Tensor, n_latents: int, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step of every option, what they are of fp32's, and the backend."""
    steps = {name(state): step_of(x, n_latents, state) for state in OPTIONS}
    seconds: dict[str, list[Seconds]] = {of: [] for of in steps}
    variance = float(x.var(0).sum())
    for _ in range(rounds + 1):
        for of, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step.step(x, lr=1e-4, variance=variance)
            seconds[of].append(Seconds(time.perf_counter() - wall, time.process_time() - processor))
    found: dict[str, dict[str, Any]] = {}
    for of, own in seconds.items():
        found[of] = {"backend": steps[of].backend_used, "bytes_a_parameter": held(steps[of])}
        for place, clock in enumerate(Seconds._fields):
            each = [(now[place], fp32[place]) for now, fp32 in zip(own[1:], seconds[name(PLAIN)][1:], strict=True)]
            found[of][clock] = statistics.median(now for now, _ in each)
            found[of][f"{clock}_over_float32"] = statistics.median(now / fp32 for now, fp32 in each)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2**17, help="activations, held-out ones included")
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--times", type=int, nargs="+", help="numbers of latents whose steps are timed, instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = load(given.cache, given.rows)
    x = torch.from_numpy(np.load(rows, mmap_mode="r")[: given.batch].astype(np.float32))
    result: dict[str, Any] = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "cpu": _cpu(),
                    "features": features(), "load": os.getloadavg()[0]},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "activations": {"model": "SmolLM2-135M", "hook": HOOK, "rows": given.rows}, "d_model": x.shape[1], "k": K,
        "batch": given.batch,
    }  # fmt: skip
    if given.times:
        result["rounds"] = given.rounds
        result["by_latents"] = {n: timed(x, n, rounds=given.rounds) for n in given.times}
    else:
        with tempfile.TemporaryDirectory() as place:
            judged = trained(rows, Path(place), given)
        keys, base = ("fvu", "l0", "dead_fraction", "tokens"), judged[name(PLAIN)]["fvu"]
        result |= {"n_latents": given.latents, "steps": given.steps, "heldout_fraction": HELDOUT}
        result["options"] = {
            of: {key: own[key] for key in keys} | {"fvu_over_float32": own["fvu"] / base}
            for of, own in judged.items()
        }  # fmt: skip
    out = given.out or Path(__file__).parent / "results" / ("state_times.json" if given.times else "state.json")
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
