"""Matryoshka dictionaries (Bussmann et al. 2025): every prefix of the latents rebuilds x by itself."""

import dataclasses
import math
import random
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import (
    AUTOENCODER,
    THRESHOLD,
    Nesting,
    TensorSpec,
    Top,
    TopOfBatch,
)
from sae_dist.sae.variants.keys import ByRowsFirst, Sized


@frozen
class MatryoshkaTopK(Sized):
    """Matryoshka over TopK: the mean of the squared errors of reconstructions from the first latents only.

    The k largest pre-activations of every token are active; reconstruction p reads those of prefix p. So the first
    latents learn what is general, and cannot leave a part of it to more special ones (absorption).
    """

    kind: Literal["matryoshka_topk"] = "matryoshka_topk"
    # shares of the latents: each time the first ones, which rebuild the row by themselves
    prefixes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
    random_prefixes: bool = False  # drawn anew at every step, as many as `prefixes`, log-uniformly from its first on

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[-1:] != (1.0,):
            raise ValueError(f"prefixes={list(self.prefixes)} must rise to 1, the whole dictionary")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> TopOfBatch | Top:
        return Top(self.k)

    @property
    def nesting(self) -> Nesting:
        n = len(self.prefixes)
        return Nesting((1 / n,) * n, finished=n - 1)

    def at(self, progress: float) -> Self:
        """Random prefixes are a function of the progress, so that a run that is resumed draws the same."""
        if not self.random_prefixes:
            return self
        draw, least = random.Random(f"{self.kind} {progress}"), math.log(self.prefixes[0])
        shares = sorted(math.exp(least * draw.random()) for _ in self.prefixes[1:])
        return dataclasses.replace(self, prefixes=(*dict.fromkeys(s for s in shares if s < 1), 1.0))

    def group(self, latent: Int[Tensor, "..."], place: Int[Tensor, "..."]) -> Int[Tensor, "..."]:  # noqa: ARG002
        ends = torch.tensor([math.ceil(share * self.n_latents) for share in self.prefixes], device=latent.device)
        return torch.bucketize(latent, ends, right=True)


@frozen
class Matryoshka(MatryoshkaTopK, ByRowsFirst):
    """Matryoshka over BatchTopK: the batch * k largest pre-activations of a batch are active."""

    kind: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
    k: Annotated[int, Field(ge=1)] = 32  # latents a token, in the mean

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*AUTOENCODER, THRESHOLD)

    @property
    def rule(self) -> TopOfBatch:
        return TopOfBatch(self.k)
