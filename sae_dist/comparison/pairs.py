"""Two dictionaries side by side: what matches, how one splits in the other, and what the second pass will ask."""

from collections.abc import Sequence
from typing import NamedTuple

from sae_dist.comparison import matching
from sae_dist.comparison.activations import Activations
from sae_dist.comparison.config import CompareConfig, Measure
from sae_dist.comparison.matching import Matches, Side
from sae_dist.comparison.neurons import Neurons
from sae_dist.comparison.rows import Place
from sae_dist.comparison.splitting import Splits, split
from sae_dist.comparison.stitching import Stitch, choose
from sae_dist.comparison.virtual_weights import Stream, feeds
from sae_dist.config import UserError
from sae_dist.sae.dictionary import Dictionary
from sae_dist.shards.hooks import widths
from sae_dist.shards.imports.config import ImportConfig


class Given(NamedTuple):
    """One of the dictionaries."""

    name: str  # A, B, ...
    where: str
    dictionary: Dictionary
    place: Place


class Joined(NamedTuple):
    """Which of two dictionaries feeds the other along the residual stream."""

    earlier: int
    later: int
    stream: Stream


class Pair(NamedTuple):
    """Two dictionaries: `first` and `second` as they were given, one of them the smaller."""

    first: int
    second: int
    smaller: int
    larger: int
    measure: Measure
    found: Matches
    chance: Matches
    splits: Splits
    stitch: Stitch | None  # where both rebuild the same rows
    joined: Joined | None  # where the residual stream joins them


def pair_up(a: int, b: int, given: Sequence[Given], activations: Sequence[Activations], config: CompareConfig) -> Pair:
    one, other = given[a], given[b]
    same_space = _same_space(one, other)
    measure: Measure = config.match or ("cosine" if same_space else "correlation")
    if measure == "cosine" and not same_space:
        raise UserError(
            f"match=cosine: {one.where} and {other.where} do not rebuild the same activations, so that their decoder "
            "rows cannot be compared; use match=correlation"
        )
    first, second = (
        Side(activations[at], given[at].dictionary.parameters.W_dec if same_space else None) for at in (a, b)
    )
    found, chance = matching.match(first, second), matching.by_chance(first, second, seed=config.seed)
    smaller, larger = (a, b) if one.dictionary.n_latents <= other.dictionary.n_latents else (b, a)
    of_smaller, of_larger = (found.first, found.second) if smaller == a else (found.second, found.first)
    splits = split(of_smaller[measure], of_larger[measure], level=config.level, fires=activations[smaller].fires)
    stitch = None
    if same_space and _same_store(one, other) and not has_neurons(one, other):
        rebuilt = tuple(widths(one.place.store.meta, one.place.hooks.sides[-1]).values())
        chosen = choose(splits, activations[larger].fires, seed=config.seed)
        stitch = Stitch(given[smaller].dictionary, given[larger].dictionary, chosen, rebuilt)
    return Pair(a, b, smaller, larger, measure, found, chance, splits, stitch, _joined(a, b, given))


def _joined(a: int, b: int, given: Sequence[Given]) -> Joined | None:
    if _same_model(given[a], given[b]) and not has_neurons(given[a], given[b]):
        for earlier, later in ((a, b), (b, a)):
            before, after = given[earlier], given[later]
            writes, reads = before.place.hooks.sides[-1], after.place.hooks.reads
            if len(writes) == len(reads) == 1 and feeds(*writes, *reads):
                return Joined(earlier, later, Stream(before.dictionary, after.dictionary))
    return None


def has_neurons(*given: Given) -> bool:
    """Neurons rebuild every row as it is, so that nothing is to be added to them or taken from them."""
    return any(isinstance(each.dictionary, Neurons) for each in given)


def _same_space(one: Given, other: Given) -> bool:
    """Whether both rebuild the same activations, so that decoder rows have the same coordinates."""
    return one.place.hooks.sides[-1] == other.place.hooks.sides[-1] and _same_model(one, other)


def _same_store(one: Given, other: Given) -> bool:
    """Also where one lies elsewhere as a copy."""
    return one.place.store.meta.digest == other.place.store.meta.digest


def _same_model(one: Given, other: Given) -> bool:
    """Of two stores, an import that does not name its model may be of any."""
    a, b = one.place.store.meta, other.place.store.meta
    named = a.model != ImportConfig.model
    return _same_store(one, other) or (named and (a.model, a.model_fingerprint) == (b.model, b.model_fingerprint))
