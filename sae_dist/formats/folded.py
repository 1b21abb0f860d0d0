"""A dictionary with everything folded in, so that any tool's plain forward pass rebuilds the same rows."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.sae.dictionary import Dictionary


class Folded(NamedTuple):
    """z = x W_enc + b_enc; f = z where z > threshold, or the k largest of relu(z); y = f W_dec + b_dec, + x W_skip."""

    W_enc: Float[Tensor, "d_in n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]
    b_enc: Float[Tensor, " n_latents"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " n_latents"] | None
    b_enc_centred: Float[Tensor, " n_latents"]  # for tools that read x - b_dec themselves
    W_skip: Float[Tensor, "d_in d_out"] | None

    @property
    def is_relu(self) -> bool:
        """Whether all thresholds are 0."""
        return self.threshold is not None and not bool(self.threshold.any())


def folded(dictionary: Dictionary, *, to: str) -> Folded:
    """`fold` of a dictionary of one hook point on a side; UserError for a crosscoder."""
    if "+" in f"{dictionary.info.get('hook')}{dictionary.info.get('target_hook')}":
        cure = "; use circuit_tracer" if dictionary.info.get("cross_layer") else ""
        raise UserError(f"format={to} has no dictionaries over several hook points ({dictionary.info['hook']}){cure}")
    return fold(dictionary)


def fold(dictionary: Dictionary) -> Folded:
    """Unit decoder rows, where latents are not ranked by their values; no pre-bias."""
    W_enc, W_dec, b_enc, b_dec = (tensor.double() for tensor in dictionary.parameters)
    threshold = None if dictionary.threshold is None else dictionary.threshold.double()
    if threshold is not None:
        norm = W_dec.norm(dim=1)
        norm = norm.where(norm > 0, 1)
        W_enc, W_dec, b_enc, threshold = W_enc * norm, W_dec / norm[:, None], b_enc * norm, threshold * norm
    centre, W_skip = b_dec if dictionary.b_in is None else dictionary.b_in.double(), dictionary.W_skip
    if W_skip is not None:
        b_dec = b_dec - centre @ W_skip.double()
    return Folded(
        W_enc.float().contiguous(), W_dec.float().contiguous(), (b_enc - centre @ W_enc).float(), b_dec.float(),
        None if threshold is None else threshold.float(), b_enc.float(), W_skip,
    )  # fmt: skip


def refuse_transcoder(dictionary: Dictionary, *, to: str) -> None:
    if dictionary.b_in is not None:
        raise UserError(
            f"format={to} has no transcoders ({dictionary.info['hook']} -> {dictionary.info['target_hook']}); use "
            "saelens, sparsify or circuit_tracer"
        )


def needs_top_k(dictionary: Dictionary, *, to: str) -> int:
    """The k of a dictionary that keeps the k largest of a row; UserError for any other."""
    if dictionary.threshold is not None or dictionary.signed or dictionary.k is None:
        raise UserError(
            f"format={to} knows dictionaries that keep the k largest latents of a row; this one "
            f"({dictionary.info['variant']}) does not: use saelens or dictionary_learning"
        )
    return dictionary.k
