"""Input scaling: one scalar, applied while training, never in the store, folded into the weights on export."""


def input_scale(mean_square_norm: float, d_model: int) -> float:
    """The s for which E||s x||^2 = d_model (Templeton et al. 2024): one learning rate then fits all layers."""
    return (d_model / max(mean_square_norm, 1e-30)) ** 0.5
