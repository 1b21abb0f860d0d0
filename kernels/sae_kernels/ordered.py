"""The arithmetic of compact state: every operation rounds once, and sums have one order.

Libraries fuse operations, add in orders of their own and are inexact in square roots, each processor in its way. What
follows gives the same bits on every processor, and so do the CPU kernels (compact.h).
"""

from jaxtyping import Float, Float64
from torch import Tensor

CHUNK = 64  # rows of one partial sum


def row_sums(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows 1"]:
    """The sum of every row: the upper half is added to the lower, and so on; the lower has an odd one's middle."""
    while x.shape[1] > 1:
        half = -(-x.shape[1] // 2)
        folded = x[:, :half].clone()
        folded[:, : x.shape[1] - half] += x[:, half:]
        x = folded
    return x


def row_means(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows 1"]:
    """The mean of every row."""
    return row_sums(x) / x.shape[1]


def chunk_sums(x: Float64[Tensor, "rows d_model"]) -> Float64[Tensor, "chunks d_model"]:
    """The sums of rows 0 to 63, 64 to 127, ..., each from its first row on."""
    sums = x.new_zeros(-(-len(x) // CHUNK), x.shape[1])
    for nth in range(min(CHUNK, len(x))):
        of_chunks = x[nth::CHUNK]
        sums[: len(of_chunks)] += of_chunks
    return sums


def sum_of_chunks(sums: Float64[Tensor, "chunks d_model"]) -> Float64[Tensor, " d_model"]:
    """The sum of what `chunk_sums` gives: its chunks of chunks, and so on."""
    while len(sums) > 1:
        sums = chunk_sums(sums)
    return sums[0]


def root(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The square root, rounded correctly: an fp64 one, even if it is off by a unit, is never that close to a tie."""
    return x.double().sqrt_().float()


def remove_parallel(
    gradient: Float[Tensor, "n_latents d_model"], W_dec: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "n_latents d_model"]:
    """`reference.remove_parallel`."""
    return gradient - row_sums(gradient * W_dec) * W_dec


def unit_norm(W_dec: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "n_latents d_model"]:
    """`reference.unit_norm`."""
    return W_dec / root(row_sums(W_dec * W_dec)).clamp_min(1e-12)


def adam_(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """`reference.adam_`."""
    beta1, beta2 = betas
    _move_(first, gradient, 1 - beta1)
    second.mul_(beta2).add_((gradient * gradient).mul_(1 - beta2))
    over = root(second / (1 - beta2**step)).add_(eps)
    parameter.sub_((first / (1 - beta1**step)).mul_(lr).div_(over))


def factored_adam_(
    parameter: Float[Tensor, "rows d_model"], gradient: Float[Tensor, "rows d_model"],
    first: Float[Tensor, "rows d_model"], second_row: Float[Tensor, " rows"], profile: Float[Tensor, " d_model"],
    *, step: int, lr: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One Adam step in place with v[j, i] = row[j] profile[i] (Adafactor; Shazeer & Stern 2018, alg. 4).

    row[j] averages a latent's squared gradient over dimensions and steps; profile[i] is that of a dimension over
    latents and the steps before this one, divided by its mean, so that one pass over the rows is enough. As there, a
    row's update is cut back to a root mean square of 1 (sec. 6): a factored v can be far too small for one element.
    """
    beta1, beta2 = betas
    _move_(first, gradient, 1 - beta1)
    _move_(second_row, row_means(gradient * gradient).squeeze(1), 1 - beta2)
    over = root((second_row / (1 - beta2**step))[:, None] * profile).add_(eps)
    update = (first / (1 - beta1**step)).div_(over)
    update /= root(row_means(update * update)).clamp_min(1)
    parameter.sub_(update.mul_(lr))


def _move_(mean: Tensor, to: Tensor, share: float) -> None:
    """An exponential mean's step."""
    mean.add_((to - mean).mul_(share))
