"""Latents as other tools show them: numbers, and tokens as text."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.interpret.read_features import Features, features
from sae_dist.progress import logged
from sae_dist.sae.dictionary import WEIGHTS, Dictionary

ALIGNED = 3  # dimensions of the decoder row that are listed


class Context(NamedTuple):
    """Text in which a latent is active."""

    tokens: list[str]
    values: list[float]  # of every token; 0 where the latent is silent
    at: int  # the token that the context was chosen for
    # activations from and to, and their share of all; None: it is one of the strongest
    interval: tuple[float, float, float] | None


class Latent(NamedTuple):
    """What is known of a latent that has fired."""

    number: int
    label: str | None
    density: float  # share of the tokens on which it is active
    maximum: float
    histogram: tuple[list[float], list[int]]  # of its activations: the middle of each bar, and how many
    promoted: list[tuple[str, float]]  # output tokens, and the logit that one unit of activation adds
    suppressed: list[tuple[str, float]]
    aligned: list[tuple[int, float, float]]  # dimensions of its decoder row: value, and share of the row's L1 norm
    vector: list[float]  # its decoder row
    contexts: list[Context]


def bins(latent: Latent, context: Context) -> tuple[float, float, float]:
    """The least, the largest and the share of a context's interval as SAEDashboard says them, also of the strongest."""
    return context.interval or (-1, latent.maximum, -1)


def short(values: Float[Tensor, " n"]) -> list[float]:
    """Numbers of six digits: what JSON writes of more only makes files long."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def columns(latent: Latent) -> dict[str, Any]:
    """Its figures by the names that SAEDashboard and Neuronpedia share."""
    places, values, shares = (list(column) for column in zip(*latent.aligned, strict=True))
    middles, heights = latent.histogram
    return {
        "frac_nonzero": latent.density,
        "pos_str": [text for text, _ in latent.promoted], "pos_values": [value for _, value in latent.promoted],
        "neg_str": [text for text, _ in latent.suppressed], "neg_values": [value for _, value in latent.suppressed],
        "neuron_alignment_indices": places, "neuron_alignment_values": values, "neuron_alignment_l1": shares,
        "freq_hist_data_bar_values": middles, "freq_hist_data_bar_heights": heights,
    }  # fmt: skip


class Latents:
    """Those of a run's main dictionary, in batches, from its feature data and labels."""

    def __init__(self, run: Path, dictionary: Dictionary) -> None:
        """UserError where there is no feature data, or it is of other weights."""
        self.features: Features = features(run)
        self._dictionary = dictionary
        if self.features.about.get("weights") != dictionary.info[WEIGHTS]:
            raise UserError(
                f"{self.features.folder} is of other weights than {run}; write it again with `sae-dist pages {run} "
                "data=true`"
            )
        tokens = self.features.tokens()
        self._texts: Mapping[int, str] = {
            token: text if text is not None else own.decode(errors="replace")
            for token, text, own in zip(*(tokens[name].to_pylist() for name in ("token", "text", "bytes")), strict=True)
        }

    def batches(self, size: int, *, done: int = 0) -> Iterator[tuple[list[Latent], list[int]]]:
        """So many latents at a time, but for the first `done` batches: those that have fired, numbers of the others."""
        firsts = range(done * size, self.features.n_latents, size)
        for first in logged(firsts, "written", len(firsts), of=f"times {size:,} latents"):
            numbers = range(first, min(first + size, self.features.n_latents))
            rows = self.features.read(numbers).to_pylist()
            labels = self.features.labels(numbers)
            named = [None] * len(rows) if labels is None else labels.to_pylist()
            fired = [self._latent(row, label) for row, label in zip(rows, named, strict=True) if row["firings"]]
            yield fired, [row["latent"] for row in rows if not row["firings"]]

    def _latent(self, row: Mapping[str, Any], label: str | None) -> Latent:
        bars = len(row["histogram"])
        middles = ((np.arange(bars) + 0.5) * row["histogram_end"] / bars).tolist()
        vector = self._dictionary.parameters.W_dec[row["latent"]]
        largest = vector.topk(min(ALIGNED, len(vector)))
        aligned = zip(
            largest.indices.tolist(), short(largest.values), short(largest.values.abs() / vector.abs().sum()),
            strict=True,
        )  # fmt: skip
        return Latent(
            row["latent"], label, row["density"], row["max"], (middles, row["histogram"]),
            self._outputs(row["promoted"], row["promoted_by"]), self._outputs(row["suppressed"], row["suppressed_by"]),
            list(aligned), short(vector), [self._context(row, own) for own in row["contexts"]],
        )  # fmt: skip

    def _outputs(self, tokens: Sequence[int], logits: Sequence[float]) -> list[tuple[str, float]]:
        return [(self._texts[token], logit) for token, logit in zip(tokens, logits, strict=True)]

    def _context(self, row: Mapping[str, Any], own: Mapping[str, Any]) -> Context:
        values = torch.zeros(len(own["tokens"]))
        values[own["active"]] = torch.tensor(own["activation"])
        interval = None
        if (at := own["interval"]) >= 0:
            low, high = row["interval_edges"][at : at + 2]
            interval = low, high, row["interval_firings"][at] / row["firings"]
        return Context([self._texts[token] for token in own["tokens"]], short(values), own["at"], interval)
