"""Input scaling: one scalar, applied while training and folded into the weights of the finished dictionary."""


def input_scale(mean_square_norm: float, d_model: int) -> float:
    """The s for which E||s x||^2 = d_model (Templeton et al. 2024), so that one learning rate fits all layers."""
    return (d_model / max(mean_square_norm, 1e-30)) ** 0.5
