"""What a kind of dictionary declares about itself, and what all else iterates over.

Everything sparse is a list of (row, latent) pairs. A kind says which tensors it has, by which rule pairs are chosen,
what a chosen pair's pre-activation z becomes, and what being active costs. Who computes that on which mesh is no
concern of it: `train.parallel.step` differentiates those few numbers, kernels do the sums over pairs.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Dim = Literal["d_model", "n_latents"]


class TensorSpec(NamedTuple):
    """A tensor of a dictionary, as the finished one has it."""

    name: str
    dims: tuple[Dim, ...]
    scaled: bool = False  # in the units of x: divided by the input's scale when that is folded in
    unit: bool = False  # its rows are kept at norm 1
    # learned: by gradients, with moments. tracked: a statistic of the run, one number for all latents while training.
    role: Literal["learned", "tracked"] = "learned"
    lr_factor: float = 1.0  # of a vector of a kind's own: times the learning rate
    minimum: float | None = None  # what lies below counts as this, and is this in the finished dictionary

    def shape(self, *, n_latents: int, d_model: int) -> tuple[int, ...]:
        return tuple({"n_latents": n_latents, "d_model": d_model}[dim] for dim in self.dims)

    def size(self, *, n_latents: int, d_model: int) -> int:
        return math.prod(self.shape(n_latents=n_latents, d_model=d_model))

    @property
    def per_latent(self) -> bool:
        """Whether it has something for every latent, which ranks of a mesh share out."""
        return "n_latents" in self.dims

    @property
    def stored_transposed(self) -> bool:
        """Whether it lies in memory, and in a checkpoint, the other way round: rows are latents there."""
        return self.dims == ("d_model", "n_latents")

    def folded(self, part: Tensor, scale: float) -> Tensor:
        """Of what a dictionary has on x * scale, what does the same on x: the tensor, or some of its rows.

        z = (s x - b_dec) W_enc + b_enc, so z / s = (x - b_dec / s) W_enc + b_enc / s: relu, a choice of the largest and
        one by thresholds commute with a positive factor, and x_hat = (z / s) W_dec + b_dec / s. W_dec stays as it is.
        """
        part = part if self.minimum is None else part.clamp_min(self.minimum)
        return part / scale if self.scaled else part


AUTOENCODER = (
    TensorSpec("W_enc", ("d_model", "n_latents")),
    TensorSpec("W_dec", ("n_latents", "d_model"), unit=True),
    TensorSpec("b_enc", ("n_latents",), scaled=True),
    TensorSpec("b_dec", ("d_model",), scaled=True),
)


class Top(NamedTuple):
    """Of every row the k largest positive pre-activations."""

    k: int


class TopOfBatch(NamedTuple):
    """Of a batch the batch * k largest positive ones, and at inference those above the tracked `threshold`."""

    k: int


class Above(NamedTuple):
    """Of every row all positive ones above the kind's own `level`, a number for each latent."""

    k: int  # how many are expected, in the mean


Rule = Top | TopOfBatch | Above


class Activated(NamedTuple):
    """What pairs are worth; gradients flow to z and to the latents' own vectors."""

    values: Float[Tensor, "..."]  # that the decoder reads; 0 is silent
    cost: Float[Tensor, "..."] | None = None  # that the penalty adds up over a row; None: there is no penalty


class Penalty(NamedTuple):
    """A price of activity in the loss: a function of `cost`, summed over a row, in the mean over the batch."""

    value: Float[Tensor, ""]
    slope: Float[Tensor, ""]  # its derivative


class Variant(Protocol):
    """What a file of this folder defines: a frozen dataclass of these fields and its own."""

    @property
    def kind(self) -> str: ...
    @property
    def n_latents(self) -> int: ...
    @property
    def k_aux(self) -> int | None: ...
    @property
    def aux_coefficient(self) -> float: ...
    @property
    def dead_after_tokens(self) -> int: ...

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Its tensors: those of AUTOENCODER, and vectors of its own."""
        ...

    @property
    def rule(self) -> Rule:
        """How pairs are chosen while it is trained."""
        ...


@runtime_checkable
class Elementwise(Protocol):
    """What a kind has besides where a chosen pair is worth something else than its z, or costs something.

    `own` are the latents' own learned vectors by name: of all latents, or of each pair's latent.
    """

    def start(self, level: float) -> Mapping[str, float]:
        """Its own vectors before step 0; above `level` lie about `rule.k` pre-activations of a row."""
        ...

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> Float[Tensor, " n_latents"]:
        """Of the rule `Above`: where pairs begin to matter, for their values or for a gradient; 0 or more."""
        ...

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        """What pairs with these pre-activations, all positive, are worth."""
        ...

    def penalty(self, mean: Float[Tensor, ""]) -> Penalty:
        """What the cost of a row, in the mean over the batch, adds to the loss; fp64."""
        ...


def own_vectors(variant: Variant) -> tuple[TensorSpec, ...]:
    """The latents' own learned vectors, beside the autoencoder's tensors."""
    return tuple(spec for spec in variant.tensors if spec not in AUTOENCODER and spec.role == "learned")


def tracks_threshold(variant: Variant) -> bool:
    """Whether the run keeps a statistic that the finished dictionary chooses by."""
    return any(spec.role == "tracked" for spec in variant.tensors)


def check_counts(n_latents: int, k: int, k_aux: int | None) -> None:
    """ValueError where a row would have more latents than there are."""
    if k > n_latents:
        raise ValueError(f"k={k} exceeds n_latents={n_latents}; choose k <= n_latents")
    if k_aux is not None and k_aux > n_latents:
        raise ValueError(f"k_aux={k_aux} exceeds n_latents={n_latents}; choose k_aux <= n_latents")
