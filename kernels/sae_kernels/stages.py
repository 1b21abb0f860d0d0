"""A training step in stages, between which a trainer over many processes exchanges tensors.

The order is: `rows`, `select`, `partial` (its sum over the parts of a dictionary is the reconstruction), `d_z`,
`save_for_backward_`, `update_latents_`, `update_b_dec_`; `row_gradients` comes before the updates where dense gradients
are needed. Up to `d_z` a row's result does not depend on the other rows, except that a library's matrix product may
round by its shape (the compiled kernels' product does not).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_kernels.reference import Selected
from sae_kernels.row_state import Hyper


class LossTerm(NamedTuple):
    """One term of the loss (the reconstruction, AuxK), whose gradients are sums over its (row, latent) pairs."""

    errors: Float[Tensor, "errors d_out"]  # target less reconstruction: a row for each row of the batch, or more
    selected: Selected  # the pairs; indices within this shard
    d_z: Float[Tensor, "batch k"]  # d loss / d z, 0 at empty places
    scale: float  # d loss / d x_hat = scale * errors
    # d loss / d W_dec[j] is the sum of weights * errors; None: weights = scale * values. A pair may have a gradient in
    # z without a part in x_hat, and the reverse.
    weights: Float[Tensor, "batch k"] | None = None
    # The row of errors that each pair multiplies; None: that of its own row. With nested reconstructions a latent needs
    # one row, the sum of the errors of all those that it is part of, however many there are.
    source: Int[Tensor, "batch k"] | None = None


class LinearGradients(NamedTuple):
    """Gradients that every latent has besides its pairs: those of costs that are linear in z, or in a row's norm."""

    # d loss / d W_enc[:, j] has enc[j] * row, d loss / d b_enc[j] has enc[j]; None: nothing
    enc: Float[Tensor, " n_latents"] | None = None
    row: Float[Tensor, " d_in"] | None = None  # the mean row of the batch, as the encoder reads it
    # d loss / d W_dec[j] has dec[j, s] * W_dec[j] in the s-th of equal parts of d_out; None: nothing
    dec: Float[Tensor, "n_latents sites"] | None = None


class AuxK(NamedTuple):
    """AuxK in a fused step: dead latents reconstruct the error of the others."""

    places: Int[Tensor, " dead"]  # one at least
    k: int  # latents a row; may exceed the number of dead ones
    scale: float  # d loss / d e_hat = scale * (e - e_hat)


class RowGradients(NamedTuple):
    """Dense gradients of the latents' rows, and what b_dec's has of them where x - b_dec goes into the encoder."""

    enc: Float[Tensor, "n_latents d_in"]
    dec: Float[Tensor, "n_latents d_out"]
    b_enc: Float[Tensor, " n_latents"]
    through_centre: Float[Tensor, " d_in"]  # sum_j d_b_enc[j] W_enc[:, j]: of what is subtracted from x, negated


class Stages(Protocol):
    """The kernels bound to the tensors of a dictionary, or of a part of one."""

    def rows(self, x: Float[Tensor, "batch d_in"]) -> Shaped[Tensor, "batch width"]:
        """x - b_dec, or x - b_in, in the format of the encoder's product; `width` is d_in, perhaps padded."""
        ...

    def select(
        self, rows: Shaped[Tensor, "batch width"], *, k: int, latents: Int[Tensor, " some"] | None = None,
        level: Float[Tensor, " n_latents"] | None = None,
    ) -> Selected:  # fmt: skip
        """The k largest z of every row, among `latents` or all: int64 indices, descending, ties by the lower index.

        With a `level`, values are z - level instead of z.
        """
        ...

    def partial(self, selected: Selected) -> Float[Tensor, "batch d_out"]:
        """sum_j values_j W_dec[j], without b_dec."""
        ...

    def d_z(
        self, errors: Float[Tensor, "errors d_out"], selected: Selected, *, scale: float,
        source: Int[Tensor, "batch k"] | None = None,
    ) -> Float[Tensor, "batch k"]:  # fmt: skip
        """scale * errors . W_dec[j] at every selected place, 0 at empty ones; `source` as in LossTerm."""
        ...

    def mean_z(self, rows: Shaped[Tensor, "batch width"]) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " n_latents"]]:
        """The mean row, and the mean z of every latent: nothing of size [batch, n_latents] is needed."""
        ...

    def save_for_backward_(
        self, rows: Shaped[Tensor, "batch width"], terms: Sequence[LossTerm], linear: LinearGradients | None = None
    ) -> None:
        """Keeps the pairs of the loss's terms, sorted by latent, until the update, and what latents have besides."""
        ...

    def row_gradients(self) -> RowGradients:
        """The dense gradients of what was saved."""
        ...

    def update_latents_(self, gradients: RowGradients | None, hyper: Hyper) -> Float[Tensor, " d_in"]:
        """Adam on the rows, from dense gradients or from what was saved; returns `through_centre`."""
        ...

    def update_b_dec_(self, gradient: Float[Tensor, " d_out"], hyper: Hyper) -> None:
        """Adam on b_dec."""
        ...
