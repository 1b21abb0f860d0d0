"""The stages of the paper, each repeated from where it stopped: dictionaries of three sizes, what is in them."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_kernels import Active
from torch import Tensor

from benchmarks.paper import trained
from benchmarks.paper_2024 import completeness
from benchmarks.paper_2024.completeness import Firings
from benchmarks.paper_2024.sizes import Size
from sae_dist.sae import find
from sae_dist.service.steer_job import SteeredRun
from sae_dist.shards.reader import Store, heldout
from sae_dist.steer.attribution import ablate, attribute, logit_difference, rank_correlation
from sae_dist.sweep.folder import read_points
from sae_dist.sweep.tables import report_tables
from sae_dist.train.members import MAIN

logger = logging.getLogger("paper-2024")
RECIPES: dict[str, dict[str, Any]] = {
    "relu_norm": {"sae": "relu_norm", "train.clip_norm": 1.0},
    "jumprelu": {"sae": "jumprelu"},
}
CONTEXT, LATENTS = 64, 100  # tokens of a sequence in which latents are ablated, and how many of its active ones
BATCH_ROWS = 4096
Points = dict[int, Path]  # of the longest training, by width


def dictionaries(out: Path, size: Size, given: Mapping[str, Any], recipe: str) -> Points:
    """Those of a recipe; the paper's own is trained for several numbers of tokens, for its law of compute."""
    tokens = list(size.train_tokens if recipe == "relu_norm" else size.train_tokens[-1:])
    asked = {
        **given, "store": str(out / "store"), "out": str(out / recipe), "harvest.tokens": size.rows,
        "harvest.heldout_tokens": size.heldout, "train.batch": size.batch, "wandb.mode": "disabled",
        "sae.dead_after_tokens": max(size.train_tokens[0] // 2, 1), **RECIPES[recipe],
    }  # fmt: skip
    points = trained(asked, {"sae.n_latents": size.widths, "train.tokens": tokens})
    longest = max(point["summary"]["tokens_trained"] for point in points)
    return {
        point["summary"]["n_latents"]: out / recipe / "points" / point["id"]
        for point in points if point["summary"]["tokens_trained"] == longest
    }  # fmt: skip


def figures(out: Path, size: Size, points: Mapping[str, Points]) -> dict[str, Any]:
    """Every figure of the page."""
    largest = SteeredRun(points["relu_norm"][max(size.widths)], MAIN)
    vocab = largest.model.model.get_input_embeddings().num_embeddings
    return {
        "size": size._asdict(), "model": largest.model.name, "hook": largest.hook,
        "dictionaries": [
            {"recipe": recipe, "width": width, **_judged(folder)}
            for recipe, own in points.items() for width, folder in own.items()
        ],
        "laws": report_tables(read_points(out / "relu_norm"))["laws"],
        "completeness": {
            recipe: complete(own, largest.store, largest.hook, size, vocab) for recipe, own in points.items()
        },
        "attribution": attributions(largest, size.sequences),
    }  # fmt: skip


def _judged(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("fvu", "l0", "dead_fraction", "loss_recovered", "loss_recovered_mean")
    return {"tokens": summary["tokens_trained"], **{name: summary["eval"].get(name) for name in kept}}


def complete(points: Points, store: Store, hook: str, size: Size, vocab: int) -> dict[str, Any]:
    """Which tokens have a latent, for each width."""
    found = {}
    for width, folder in points.items():
        dictionary = find.load(str(folder))
        firings = Firings(width, vocab)
        for part in heldout(store, hook, BATCH_ROWS):
            active = dictionary.encode(part.x.float())
            firings.add(active.indices.numpy(), active.rows.numpy(), part.token.astype(np.int64))
        asked = firings.rows >= size.least_rows
        frequency, best = firings.rows[asked] / firings.rows.sum(), firings.best()[asked]
        curve = completeness.fit(frequency, best >= completeness.LEVEL)
        found[width] = {
            "alive": firings.alive, "concepts": int(asked.sum()), "has": int((best >= completeness.LEVEL).sum()),
            "curve": None if curve is None else curve._asdict(), "bins": _bins(frequency, best),
        }  # fmt: skip
    middles = [own["curve"]["middle"] * own["alive"] for own in found.values() if own["curve"]]
    return {"widths": found, "spread": completeness.spread(middles) if len(middles) == len(found) else None}


def _bins(frequency: Float[np.ndarray, " n"], best: Float[np.ndarray, " n"]) -> list[tuple[float, float, int]]:
    """The share of concepts that have a latent, by parts of equal width in the logarithm: middle, share, concepts."""
    edges = np.geomspace(frequency.min(), frequency.max() * (1 + 1e-9), 13)
    place = np.searchsorted(edges, frequency, side="right") - 1
    return [
        (math.sqrt(edges[at] * edges[at + 1]), float((best[own] >= completeness.LEVEL).mean()), int(own.sum()))
        for at in range(12) if (own := place == at).any()
    ]  # fmt: skip


def attributions(run: SteeredRun, sequences: int) -> dict[str, Any]:
    """Spearman's r over active latents of each sequence, drawn by chance, between estimates and what ablation shows."""
    chance, estimated, by_activation = torch.Generator().manual_seed(0), [], []
    W_dec = run.dictionary.parameters.W_dec
    for score, x, active in _scored(run, sequences):
        there = active.indices.unique()
        chosen = there[torch.randperm(len(there), generator=chance)[:LATENTS]].sort().values
        lost = ablate(score, x, active, W_dec, chosen.tolist())
        latents, effects = attribute(score, x, active, W_dec).of_latents()
        own = torch.zeros(run.dictionary.n_latents).index_copy_(0, latents.cpu(), effects.cpu())[chosen]
        strength = torch.zeros(run.dictionary.n_latents).index_add_(0, active.indices.cpu(), active.values.cpu())[
            chosen
        ]
        estimated.append(rank_correlation(own, lost))
        by_activation.append(rank_correlation(strength, lost.abs()))
        logger.info("attribution: %d of %d sequences", len(estimated), sequences)
    return {"attribution": _mean(estimated), "activation": _mean(by_activation), "latents": LATENTS}


def _scored(run: SteeredRun, sequences: int) -> Iterator[tuple[Any, Float[Tensor, "context width"], Active]]:
    """Sequences with the model's first two choices as the score, and the active latents of all but the first token."""
    for tokens in run.sequences(sequences)[:, :CONTEXT]:
        x = run.model.capture(tokens[None], [run.hook])[run.hook][0].float()
        with torch.no_grad():
            last = run.model.model(input_ids=tokens[None].to(run.model.device), use_cache=False).logits[0, -1]
        active = run.encode(x[1:])
        shifted = torch.cat([active.offsets[:1], active.offsets])  # the first token has no row
        score = logit_difference(run.model.model, run.hook, tokens.to(run.model.device), last.topk(2).indices.tolist())
        yield score, x, Active(active.values, active.indices, shifted)


def _mean(values: list[float | None]) -> dict[str, float]:
    """With a 95 % interval of the mean, as of a normal distribution."""
    found = np.array([value for value in values if value is not None])
    half = 1.96 * found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return {"mean": float(found.mean()), "half": float(half), "sequences": len(found)}
