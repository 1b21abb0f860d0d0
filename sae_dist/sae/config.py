"""Which dictionary to train: one frozen dataclass an architecture, closed by `kind`."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import UserError, frozen


@frozen
class TopK:
    """TopK with AuxK (Gao et al. 2024): the k largest pre-activations of every token are its latents."""

    kind: Literal["topk"] = "topk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000  # a latent silent for this long is dead

    def __post_init__(self) -> None:
        _check_counts(self.n_latents, self.k, self.k_aux)


@frozen
class BatchTopK:
    """BatchTopK with AuxK (Bussmann et al. 2024): of a batch the batch * k largest pre-activations, wherever they are.

    At inference a token's latents are those above one threshold, the running mean of the smallest that was chosen.
    """

    kind: Literal["batchtopk"] = "batchtopk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32  # latents a token, in the mean
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000

    def __post_init__(self) -> None:
        _check_counts(self.n_latents, self.k, self.k_aux)


SAEConfig = Annotated[TopK | BatchTopK, Field(discriminator="kind")]


def _check_counts(n_latents: int, k: int, k_aux: int | None) -> None:
    if k > n_latents:
        raise ValueError(f"k={k} exceeds n_latents={n_latents}; choose k <= n_latents")
    if k_aux is not None and k_aux > n_latents:
        raise ValueError(f"k_aux={k_aux} exceeds n_latents={n_latents}; choose k_aux <= n_latents")


def resolved_k_aux(sae: SAEConfig, d_model: int) -> int:
    """k_aux as given, else the power of two nearest below d_model / 2 (Gao et al. 2024, App. A.2)."""
    if sae.k_aux is not None:
        return sae.k_aux
    return min(1 << max(d_model // 2, 1).bit_length() - 1, sae.n_latents)


def check_width(sae: SAEConfig, d_model: int) -> None:
    """Refuses a dictionary that cannot work on activations of this width."""
    if sae.n_latents <= sae.k:
        raise UserError(f"sae.n_latents={sae.n_latents} leaves sae.k={sae.k} nothing to choose from; use more latents")
    if sae.k > d_model:
        raise UserError(
            f"sae.k={sae.k} exceeds d_model={d_model}: any {d_model} directions rebuild x; choose a smaller k"
        )
