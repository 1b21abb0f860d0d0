"""Input scaling: one scalar, applied while training, never in the store, folded into the weights on export."""

from torch import Tensor

from sae_dist.sae.initialize import Parameters


def input_scale(mean_square_norm: float, d_model: int) -> float:
    """The s for which E||s x||^2 = d_model (Templeton et al. 2024): one learning rate then fits all layers."""
    return (d_model / max(mean_square_norm, 1e-30)) ** 0.5


def fold_scale(parameters: Parameters, scale: float) -> Parameters:
    """Parameters that do on raw x what the given ones do on s x; decoder rows keep norm 1.

    z = (s x - b_dec) W_enc + b_enc, so z / s = (x - b_dec / s) W_enc + b_enc / s: relu and top-k commute with a
    positive factor, the same latents are chosen, their values are in the units of x, x_hat = (z / s) W_dec + b_dec / s.
    """
    return Parameters(*(folded(name, tensor, scale) for name, tensor in parameters._asdict().items()))


def folded(name: str, part: Tensor, scale: float) -> Tensor:
    """`fold_scale` of one parameter, or of some of its rows."""
    return part / scale if name in ("b_enc", "b_dec", "threshold") else part
