"""How many latents a certified exact re-check must read behind an int8 or int16 product: too many, and hardly any.

    python -m benchmarks.int8_screen --cache ~/.cache/sae_dist/bench

With q(.) a row rounded to integers, |x.w - q(x).q(w)| <= E = ||x - q(x)|| ||w|| + ||q(x)|| ||w - q(w)||:
only latents whose estimate + E reaches the k-th largest estimate - E can be among the k best: the candidates, which
an exact re-check must read. Reports how many there are while a dictionary trains, how far the bound is from the error
that it bounds, and how much memory the re-check reads beside the product (of which the screen would save half). int16
is what the kernels' screen does (kernels/sae_kernels/cpu/screen.h), its norms limited so that sums fit 32 bits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sae_kernels.shard import Shard

from benchmarks.activations import load
from benchmarks.kernels import dictionary

ROWS = 256


def rounded(a: torch.Tensor, bits: int) -> torch.Tensor:
    scale = a.abs().amax(1, keepdim=True).clamp_min(1e-20) / (2 ** (bits - 1) - 1)
    if bits == 16:
        scale = torch.maximum(scale, a.norm(dim=1, keepdim=True) / 46000)
    return (a / scale).round() * scale


def certificate(sae: Shard, x: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, float]:
    """Candidates per row, x scaled and W_enc scaled back by `scale` [d_model] before either is rounded."""
    rows = (x - sae.b_dec).bfloat16().float()
    W = sae.W_enc.t().bfloat16().float()
    exact = rows @ W.t() + sae.b_enc
    rows, W = rows * scale, W / scale
    q_rows, q_W = rounded(rows, bits), rounded(W, bits)
    estimate = q_rows @ q_W.t() + sae.b_enc
    bound = (rows - q_rows).norm(dim=1)[:, None] * W.norm(dim=1) + q_rows.norm(dim=1)[:, None] * (W - q_W).norm(dim=1)
    needed = (estimate - bound).topk(sae.k).values[:, -1:].clamp_min(0)
    candidates = (estimate + bound >= needed).sum(1).float()
    read = float(candidates.mean()) * x.shape[1] * 2
    product_bytes = x.shape[1] * sae.n_latents * 2 / 64  # the product reads W once for every 64 rows
    return {
        "candidates_median": float(candidates.median()),
        "candidates_mean": float(candidates.mean()),
        "candidates_p99": float(candidates.quantile(0.99)),
        "certified_without_recheck_share": 1 - float(candidates.mean()) / sae.n_latents,
        "error_over_bound_rms": float(((estimate - exact) / bound).square().mean().sqrt()),
        "recheck_bytes_over_product_bytes": read / product_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--k-aux", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 400])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8_screen.json"))
    arguments = parser.parse_args()
    x = torch.tensor(np.load(load(arguments.cache), mmap_mode="r")).float()
    train, held_out = x[:-ROWS].split(4096)[:-1], x[-ROWS:]
    torch.manual_seed(0)
    sae = dictionary(train[0], arguments.latents, arguments.k, arguments.k_aux, "auto")
    spread = (sae.W_enc.square().mean(1) / (train[0] - sae.b_dec).square().mean(0)).sqrt().sqrt()
    results, variance = [], train[0].var(0).sum()
    for step in range(max(arguments.steps) + 1):
        if step in arguments.steps:
            plain = certificate(sae, held_out, torch.ones_like(sae.b_dec), 8)
            scaled = certificate(sae, held_out, spread, 8)
            int16 = certificate(sae, held_out, torch.ones_like(sae.b_dec), 16)
            results.append({"steps": step, "int8": plain, "int8_dimensions_balanced_first": scaled, "int16": int16})
        statistics = sae.step(train[step % len(train)], lr=1e-3, variance=variance)
    fvu = float(statistics.squared_error / 4096 / variance)
    sizes = {name: getattr(arguments, name) for name in ("latents", "k")}
    arguments.out.write_text(json.dumps({"sizes": sizes, "fvu_at_the_end": fvu, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
