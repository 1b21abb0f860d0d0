"""Which dictionary to train: the union of all kinds, told apart by `kind`."""

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import Field

from sae_dist.config import UserError
from sae_dist.sae.variants.abs_topk import AbsTopK
from sae_dist.sae.variants.batchtopk import BatchTopK
from sae_dist.sae.variants.gated import Gated
from sae_dist.sae.variants.interface import Variant, has_free_norms
from sae_dist.sae.variants.jumprelu import JumpReLU
from sae_dist.sae.variants.jumprelu_tanh import JumpReLUTanh
from sae_dist.sae.variants.keys import AboveLevel
from sae_dist.sae.variants.matryoshka import Matryoshka, MatryoshkaTopK
from sae_dist.sae.variants.multi_topk import MultiTopK
from sae_dist.sae.variants.p_anneal import PAnneal
from sae_dist.sae.variants.relu import ReLU
from sae_dist.sae.variants.relu_norm import ReLUNorm
from sae_dist.sae.variants.topk import TopK

AnyKind = (
    TopK | BatchTopK | JumpReLU | MultiTopK | AbsTopK | Matryoshka | MatryoshkaTopK | ReLU | ReLUNorm | Gated
    | JumpReLUTanh | PAnneal
)  # fmt: skip
KINDS = {kind.kind: kind for kind in get_args(AnyKind)}
SAEConfig = Annotated[AnyKind, Field(discriminator="kind")]


def resolved_k_aux(sae: Variant, d_model: int) -> int:
    """k_aux as given, else the power of two nearest below d_model / 2 (Gao et al. 2024, App. A.2).

    `d_model` is the width of one hook point: of several, AuxK would hold more pairs than a batch has active ones.
    """
    if sae.k_aux is not None:
        return sae.k_aux
    return min(1 << max(d_model // 2, 1).bit_length() - 1, sae.n_latents)


def target_k(sae: Variant) -> int | None:
    """Active latents a token that a kind aims at; None for one that has a price of activity instead."""
    return None if isinstance(sae, AboveLevel) else sae.k


def check_width(sae: Variant, d_model: int) -> None:
    """UserError where a dictionary does not fit activations of this width."""
    k = sae.k
    if sae.n_latents <= k:
        raise UserError(f"sae.n_latents={sae.n_latents} leaves sae.k={k} nothing to choose from; use more latents")
    if k > d_model:
        raise UserError(f"sae.k={k} exceeds d_model={d_model}: any {d_model} directions rebuild x; choose a smaller k")


def check_sites(sae: Variant, rebuilt: Mapping[str, int]) -> None:
    """UserError where the price of a kind's decoder norms cannot be told apart by hook points of these widths."""
    if has_free_norms(sae) and len(set(rebuilt.values())) > 1:
        said = ", ".join(f"{hook} {width}" for hook, width in rebuilt.items())
        raise UserError(
            f"sae={sae.kind} pays for the norm of a latent at each hook point, which must be of one width ({said}); "
            "choose hook points of one width, or another kind"
        )
