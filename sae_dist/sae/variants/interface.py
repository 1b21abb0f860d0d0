"""What a kind of dictionary defines; the rest of the code iterates over these declarations.

Everything sparse is a list of (row, latent) pairs. A kind says which tensors it has, by which rule pairs are chosen,
what value a chosen pair's pre-activation z becomes, and its penalty on activity. It does not know about meshes:
`train.parallel.step` differentiates values and costs of pairs, kernels compute the sums over pairs.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, Self, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.sae.scale import Scales

Dim = Literal["d_in", "d_out", "n_latents"]
Units = Literal["1", "x", "target", "z", "z / x", "target / z", "target / x"]


class Sizes(NamedTuple):
    """Of a dictionary, or of a part of one: latents, the width of x and that of what is rebuilt."""

    n_latents: int
    d_in: int
    d_out: int


class TensorSpec(NamedTuple):
    """A tensor of a dictionary, in the shape of the finished one."""

    name: str
    dims: tuple[Dim, ...]
    units: Units = "1"  # of its numbers: decides how the scales of rows are folded in on export
    unit: bool = False  # its rows are kept at norm 1
    # learned: by gradients, with Adam moments. tracked: a statistic of the run, a single number while training.
    # fixed: as it is before step 0.
    role: Literal["learned", "tracked", "fixed"] = "learned"
    lr_factor: float = 1.0  # times the learning rate, for vectors of a kind's own
    minimum: float | None = None  # lower values count as this, and are raised to it on export
    initial_norm: float = 1.0  # of the rows of W_dec before step 0
    exported: bool = True  # whether the finished dictionary has it

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(getattr(sizes, dim) for dim in self.dims)

    def size(self, sizes: Sizes) -> int:
        return math.prod(self.shape(sizes))

    @property
    def per_latent(self) -> bool:
        """Whether it has an entry per latent, so that feature ranks split it."""
        return "n_latents" in self.dims

    @property
    def stored_transposed(self) -> bool:
        """Whether memory and checkpoints store its transpose, whose rows are latents."""
        return self.dims == ("d_in", "n_latents")

    def folded(self, part: Tensor, scales: Scales, *, first: int = 0) -> Tensor:
        """Folds in the scales: the tensor for raw rows, or rows of it from `first` on, from the one for scaled rows.

        A row of W_enc is a latent, too.
        With scales S of x and T of the target, a factor a dimension, z = (S x - b_in) W_enc + b_enc and T y_hat =
        z W_dec + b_dec. Therefore z / c = (x - b_in / S) (S / c) W_enc + b_enc / c and y_hat = (z / c) (c / T) W_dec +
        b_dec / T. Relu, top k and thresholds commute with the positive factor c. With one hook point c is T, and W_dec
        does not change. Where x itself is reconstructed, b_in is b_dec and T is S, so W_enc does not change either.
        What W_skip adds to T y_hat, (S x - b_in) W_skip, is (x - b_in / S) S W_skip / T in y_hat.
        """
        part = part if self.minimum is None else part.clamp_min(self.minimum)
        unit = self._unit(part, scales, first)
        return part if isinstance(unit, float) and unit == 1 else part / unit

    def unfolded(self, part: Tensor, scales: Scales) -> Tensor:
        """The inverse of `folded`: the tensor for scaled rows, from the one for raw rows."""
        return part * self._unit(part, scales, 0)

    def _unit(self, part: Tensor, scales: Scales, first: int) -> float | Tensor:
        s, t, c = scales.x.by_dim(part.device), scales.target.by_dim(part.device), scales.z
        match self.units:
            case "1":
                return 1.0
            case "x":
                return s
            case "target":
                return t
            case "z":
                return c
            case "z / x":
                return c / s
            case "target / z":
                return t / c
            case "target / x":
                return t / (s[first : first + len(part), None] if isinstance(s, Tensor) else s)


AUTOENCODER = (
    TensorSpec("W_enc", ("d_in", "n_latents"), units="z / x"),
    TensorSpec("W_dec", ("n_latents", "d_out"), units="target / z", unit=True),
    TensorSpec("b_enc", ("n_latents",), units="z"),
    TensorSpec("b_dec", ("d_out",), units="target"),
)
# The centre of x where other rows are reconstructed, which b_dec is the centre of. Constant: b_enc can learn the rest.
B_IN = TensorSpec("b_in", ("d_in",), units="x", role="fixed")

# A linear map from x to what is rebuilt, beside the latents of a transcoder.
W_SKIP = TensorSpec("W_skip", ("d_in", "d_out"), units="target / x")

FREE_AUTOENCODER = (AUTOENCODER[0], AUTOENCODER[1]._replace(unit=False, initial_norm=0.1), *AUTOENCODER[2:])
# What inference compares z with: one number for all latents, as in training (0 where the rule does not track it).
THRESHOLD = TensorSpec("threshold", ("n_latents",), units="z", role="tracked")
NORM = "norm"  # the key in `own` of the norms of decoder rows, where these are free


class Top(NamedTuple):
    """Choose the k largest positive pre-activations of every row; `signed`: the k largest by size, of any sign."""

    k: int
    signed: bool = False


class TopOfBatch(NamedTuple):
    """Choose the batch * k largest positive ones of a batch; at inference, those above the tracked `threshold`."""

    k: int


class Above(NamedTuple):
    """Choose all above the kind's `level`."""

    k: int  # the expected number a row


Rule = Top | TopOfBatch | Above


class Activated(NamedTuple):
    """Values and costs of pairs; gradients flow to z and to the latents' own vectors."""

    values: Float[Tensor, "..."]  # read by the decoder; 0 is silent
    cost: Float[Tensor, "..."] | None = None  # summed over a row by the penalty; None: no penalty
    # Read by the decoder in a second reconstruction, whose squared error joins the loss. It trains z and the latents'
    # own vectors; decoder and b_dec are constant in it.
    frozen: Float[Tensor, "..."] | None = None


class Penalty(NamedTuple):
    """The penalty on activity: a function of the cost of a row, in the mean over the batch."""

    value: Float[Tensor, ""]
    slope: Float[Tensor, ""]  # its derivative


class Nesting(NamedTuple):
    """Reconstructions that contain each other: number p is made of the pairs of groups 0 to p."""

    weights: tuple[float, ...]  # of the squared error of each in the loss
    finished: int  # the number of the one that the finished dictionary gives


class Variant(Protocol):
    """A kind of dictionary: a frozen dataclass with these fields and its own."""

    @property
    def kind(self) -> str: ...
    @property
    def n_latents(self) -> int: ...
    @property
    def k(self) -> int: ...  # active latents a token in the finished dictionary, at most, in the mean or expected
    @property
    def k_aux(self) -> int | None: ...
    @property
    def aux_coefficient(self) -> float: ...
    @property
    def dead_after_tokens(self) -> int | None: ...  # `TrainConfig.dead_after` resolves it

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Those of AUTOENCODER, and vectors of its own."""
        ...

    @property
    def rule(self) -> Rule:
        """How pairs are chosen in training."""
        ...


@runtime_checkable
class Elementwise(Protocol):
    """What a kind also defines if the value of a pair is not its z, or if it has a penalty.

    `own` are the kind's learned vectors by name: for all latents, or gathered for each pair's latent. Where decoder
    rows are free (their spec is not `unit`), it also has their norms as NORM; of several sites, the sum of their norms.
    """

    def start(self, level: float) -> Mapping[str, float]:
        """Initial values of its own vectors, and of b_enc if not 0; about k pre-activations of a row exceed `level`."""
        ...

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> Float[Tensor, " n_latents"] | None:
        """For the rule `Above`: the z above which pairs have values or gradients; of any sign. None: 0."""
        ...

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        """Values and costs of pairs with these pre-activations."""
        ...

    def penalty(self, mean: Float[Tensor, ""], *, variance: float, width: int) -> Penalty:
        """The penalty for a mean cost of a row; fp64.

        The squared error is divided by `variance` in the loss, the mean over rows of ||x - mean||^2 in `width` dims.
        """
        ...


@runtime_checkable
class Rescaled(Protocol):
    """What a kind also defines if its penalty is a function of something else than costs.

    Costs then say how its gradient is shared out among pairs; all of them are multiplied by one factor, a constant,
    with which their sum over the batch is that of `worth`.
    """

    def worth(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """Of pairs with these pre-activations; the penalty is a function of its mean over rows."""
        ...


@runtime_checkable
class CostlySilence(Protocol):
    """What a kind also defines if latents that were not chosen cost something that is linear in their z.

    A sum over silent pairs is the sum over all, which needs the mean z of a latent only, less that over the chosen
    ones, which `Elementwise.activate` subtracts from the cost of a pair.
    """

    def silence(
        self, mean_z: Float[Tensor, " n_latents"], own: Mapping[str, Float[Tensor, " n_latents"]]
    ) -> Float[Tensor, " n_latents"]:
        """The mean cost of a row if all latents were silent, by latent; linear in z."""
        ...


@runtime_checkable
class Nested(Protocol):
    """What a kind also defines if its loss has reconstructions that contain each other."""

    @property
    def nesting(self) -> Nesting: ...

    def group(self, latent: Int[Tensor, "..."], place: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The first reconstruction that has a pair, by its latent and its place in its row, largest z first."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """What a kind also defines if its configuration changes during training."""

    def at(self, progress: float) -> Self:
        """The kind after this share of all steps."""
        ...


@runtime_checkable
class RowsFirst(Protocol):
    """What a kind also defines if its first steps choose the k largest of every row, and later ones by its rule."""

    @property
    def rows_fraction(self) -> float:
        """The share of all steps that these are."""
        ...


def tensors(variant: Variant, *, transcodes: bool, skip: bool = False) -> tuple[TensorSpec, ...]:
    """All tensors of a dictionary of that kind, which perhaps rebuilds something else than its input, with a skip."""
    return (*variant.tensors, *([B_IN] if transcodes else []), *([W_SKIP] if skip else []))


def own_vectors(variant: Variant) -> tuple[TensorSpec, ...]:
    """The learned vectors of a kind besides those of AUTOENCODER."""
    names = {spec.name for spec in AUTOENCODER}
    return tuple(spec for spec in variant.tensors if spec.name not in names and spec.role == "learned")


def spec_of(variant: Variant, name: str) -> TensorSpec:
    """The declaration of one tensor."""
    return next(spec for spec in variant.tensors if spec.name == name)


def has_free_norms(variant: Variant) -> bool:
    """Whether decoder rows have any norm, which the kind's mathematics reads as NORM."""
    return isinstance(variant, Elementwise) and not spec_of(variant, "W_dec").unit


def tracks_threshold(variant: Variant) -> bool:
    """Whether training has one threshold for the finished dictionary: a running mean, or 0."""
    return any(spec.role == "tracked" for spec in variant.tensors)


def linear(progress: float, *, start: float, end: float, over: float) -> float:
    """From `start` to `end` in a straight line over that share of all steps, then `end`."""
    return end if over == 0 or progress >= over else start + (end - start) * progress / over


def check_counts(n_latents: int, k: int, k_aux: int | None, *, name: str = "k") -> None:
    """ValueError where k, a number of that name, or k_aux exceeds n_latents."""
    if k > n_latents:
        raise ValueError(f"{name}={k} exceeds n_latents={n_latents}; choose {name} <= n_latents")
    if k_aux is not None and k_aux > n_latents:
        raise ValueError(f"k_aux={k_aux} exceeds n_latents={n_latents}; choose k_aux <= n_latents")
