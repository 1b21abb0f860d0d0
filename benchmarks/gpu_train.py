"""A whole training on a GPU, from a store on disk with checkpoints, beside the bare step.

Makes rows (sparse sums of 4 d_model directions and noise, bf16), imports them as `sae-dist store import` does, trains
as `sae-dist train` does, with the dictionary on the GPU, and times `Shard.step` alone on rows that are there.
`python benchmarks/gpu_train.py` writes results/gpu_train.json. `--tiny` does it at toy sizes, on a CPU if need be.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sae_kernels.shard import Shard
from safetensors.torch import save_file

from sae_dist import storage
from sae_dist.config import load
from sae_dist.sae import dictionary
from sae_dist.sae.config import resolved_k_aux
from sae_dist.service.config import TrainJob
from sae_dist.service.train_job import train_and_evaluate
from sae_dist.shards import imports, reader
from sae_dist.shards.imports import ImportConfig
from sae_dist.train.config import TrainConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(rows: int, d_model: int, folder: Path, *, active: int = 24) -> None:
    """Files of at most 65,536 rows."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_model, d_model, generator=generator, device=DEVICE))
    for first in range(0, rows, 65536):
        n = min(65536, rows - first)
        chosen = torch.randint(len(directions), (n, active), generator=generator, device=DEVICE)
        strength = torch.rand(n, active, generator=generator, device=DEVICE) + 0.5
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
        x += 0.02 * torch.randn(n, d_model, generator=generator, device=DEVICE)
        save_file({"x": x.bfloat16().cpu()}, folder / f"{first:09d}.safetensors")


def bare(job: TrainJob, x: torch.Tensor, *, steps: int) -> float:
    """Milliseconds a step from the dictionary that was trained, rows on the device, nothing read and nothing saved."""
    trained = dictionary.load(Path(job.out) / "dictionary")
    W_enc, W_dec, b_enc, b_dec = (tensor.to(DEVICE) for tensor in trained.parameters)
    sae = Shard(
        W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, k=job.sae.k, k_aux=resolved_k_aux(job.sae, W_dec.shape[1]),
        aux_coefficient=job.sae.aux_coefficient, dead_after_tokens=job.train.dead_after(job.sae),
    )  # fmt: skip
    x = x.to(DEVICE).float()
    variance = float((x - x.mean(0)).square().sum(1).mean())
    for _ in range(5):
        sae.step(x, lr=1e-5, variance=variance)
    started = time.perf_counter()
    for _ in range(steps):
        float(sae.step(x, lr=1e-5, variance=variance).squared_error)  # waits for the step
    return 1e3 * (time.perf_counter() - started) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_train.json")
    parser.add_argument("--n-latents", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=1600)
    given = parser.parse_args()
    if DEVICE.type == "cpu" and not given.tiny:
        parser.error("no GPU here; --tiny runs the script at toy sizes on a CPU")
    rows, d_model, n_latents, k, batch, steps = 524_288, 768, given.n_latents, 32, 4096, given.steps
    if given.tiny:
        rows, d_model, n_latents, k, batch, steps = 4096, 24, 96, 4, 64, 20
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"}
    result |= {"torch": torch.__version__, "batch": batch, "d_model": d_model, "n_latents": n_latents, "k": k}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "rows").mkdir()
        made(rows, d_model, folder / "rows")
        started = time.perf_counter()
        store = imports.import_store(storage.open(str(folder / "store")), ImportConfig(path=str(folder / "rows")))
        result["import_rows_per_second"] = rows / (time.perf_counter() - started)
        values = {
            "out": str(folder / "run"), "store": str(folder / "store"), "wandb": {"mode": "disabled"},
            "sae": {"kind": "topk", "n_latents": n_latents, "k": k},
            "order": {"lanes": 8, "window": 4},
            "train": {"tokens": None, "steps": steps, "batch": batch, "checkpoint_every": max(steps // 2, 1),
                      "log_every": max(steps // 16, 1),
                      "init_rows": min(rows // 4, TrainConfig(steps=1).rows_to_begin(n_latents, stored=rows))},
        }  # fmt: skip
        job = load(TrainJob, values)
        started = time.perf_counter()
        summary = train_and_evaluate(job, stop=lambda: False)
        assert summary is not None
        result["command_seconds"] = time.perf_counter() - started
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        last = lines[-1]
        kept = ("tokens_per_second", "starved_fraction", "checkpoint_seconds", "checkpoint_wait_seconds", "fvu")
        result |= {"train": {name: last[name] for name in kept}, "heldout_fvu": summary["eval"]["fvu"]}
        seconds = [line["tokens"] / line["tokens_per_second"] for line in lines]  # since the first step
        result["second_half_tokens_per_second"] = (last["tokens"] - lines[len(lines) // 2]["tokens"]) / (
            seconds[-1] - seconds[len(lines) // 2]
        )
        unit = reader.heldout(store, "imported", batch)
        ms = bare(job, next(iter(unit)).x[:batch], steps=min(steps, 100))
        result["bare_step_tokens_per_second"] = batch / ms * 1e3
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
