"""Sweeps whose law is known: the one that OpenAI published for GPT-4."""

import math
from collections.abc import Sequence

import numpy as np

from sae_dist.sweep.law import OPENAI
from sae_dist.sweep.point import Point


def loss(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    a, b, c, both, floor, floor_k = OPENAI.values()
    return np.exp(a + b * np.log(k) + c * np.log(n) + both * np.log(k) * np.log(n)) + np.exp(
        floor + floor_k * np.log(k)
    )


def grid(sizes: Sequence[int], ks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    n, k = np.meshgrid(np.array(sizes, float), np.array(ks, float), indexing="ij")
    return n.ravel(), k.ravel()


def noisy(values: np.ndarray, scatter: float, seed: int) -> np.ndarray:
    return values * np.exp(scatter * np.random.default_rng(seed).standard_normal(len(values)))


def point(number: int, overrides: dict, fvu: float | None, **figures: float | None) -> Point:
    """A point that is done, on activations of width 64."""
    judged = {
        "fvu": fvu,
        "l0": 1.01 * overrides.get("sae.k", 8),
        "dead_fraction": 0.1,
        "loss_recovered": None,
    } | figures
    summary = {
        "n_latents": overrides.get("sae.n_latents", 512), "k": overrides.get("sae.k", 8), "d_model": 64,
        "tokens_trained": 1_000_000, "eval": judged,
    }  # fmt: skip
    return Point(f"{number:012x}", overrides, "done", 1, 10.0 + number, 0.01 * number, summary)


def points(sizes: Sequence[int], ks: Sequence[int], *, scatter: float = 0.002) -> list[Point]:
    n, k = grid(sizes, ks)
    losses = noisy(loss(n, k), scatter, 0)
    return [
        point(number, {"sae.n_latents": int(a), "sae.k": int(b)}, float(c))
        for number, (a, b, c) in enumerate(zip(n, k, losses, strict=True))
    ]


def exponents(n: np.ndarray, k: np.ndarray) -> dict[str, float]:
    """Of size and of k, in the middle of the points."""
    return {
        "x": OPENAI["beta_x"] + OPENAI["gamma"] * float(np.log(k).mean()),
        "k": OPENAI["beta_k"] + OPENAI["gamma"] * math.fsum(np.log(n)) / len(n),
    }
