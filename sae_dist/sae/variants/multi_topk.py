"""Multi-TopK (Gao et al. 2024, App. D.3)."""

from typing import Annotated, Literal

from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, Nesting, TensorSpec, Top, check_counts
from sae_dist.sae.variants.keys import Sized


@frozen
class MultiTopK(Sized):
    """TopK whose loss also has the reconstruction from more latents: L(k) + wide_weight L(wide_k).

    The dictionary then keeps its quality when more than k latents of a token are used.
    """

    kind: Literal["multi_topk"] = "multi_topk"
    wide_k: Annotated[int, Field(ge=1)] | None = None  # null: 4 k, or n_latents where that is less
    wide_weight: Annotated[float, Field(ge=0)] = 1 / 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.n_latents, self.rule.k, self.k_aux, name="wide_k")
        if self.rule.k < self.k:
            raise ValueError(f"wide_k={self.wide_k} is less than k={self.k}; choose wide_k > k")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> Top:
        return Top(self.wide_k or min(4 * self.k, self.n_latents))

    @property
    def nesting(self) -> Nesting:
        return Nesting((1.0, self.wide_weight), finished=0)

    def group(self, latent: Int[Tensor, "..."], place: Int[Tensor, "..."]) -> Int[Tensor, "..."]:  # noqa: ARG002
        return (place >= self.k).long()
