"""Bytes that a rank receives in one step, exchange by exchange: what `Mesh.traffic` counts while it runs.

The figures are those of rank 0, which has the largest part of everything. Numbers that depend on the data (keys that
reach the bound of a selection in two rounds, pairs where rows have different numbers of them) are assumed to be k a
row, evenly over the parts; no row is selected twice, and no values tie at the cut.
"""

from typing import Literal, NamedTuple

from sae_dist.plan.workload import Workload
from sae_dist.sae.variants.interface import Elementwise, Rescaled, TopOfBatch
from sae_dist.train.parallel.batch_select import DIGIT, VALUE_BITS
from sae_dist.train.parallel.batch_select import NAME as THRESHOLD
from sae_dist.train.parallel.row_select import pays_two_rounds

KEY, VALUE, INDEX, COUNT = 8, 4, 4, 8  # bytes of a (value, index) key, a value or d_z, an index, a count
SUM = 8  # bytes of a sum of squares


class Exchange(NamedTuple):
    """One kind of collective of a step."""

    name: str  # as in `Mesh.traffic`
    axis: Literal["data", "feature", "world"]
    calls: int  # in a step
    bytes: int  # received in a step


def exchanges(work: Workload) -> list[Exchange]:
    """The exchanges of a step, of all dictionaries of the pass; none over an axis with one rank."""
    if work.others:
        return [exchange for member in work.members for exchange in exchanges(member)]
    extra = 1 + work.vectors if isinstance(work.sae, Elementwise) else 0  # numbers that each pair has besides
    found = _in_lines(work, extra) if work.in_lines else _use(work, work.k, work.latents, "candidates", extra)
    if extra and work.ranks > 1:
        sums = 2 if isinstance(work.sae, Rescaled) else 1
        found.append(Exchange("cost", "world", 1, sums * SUM * (work.ranks - 1)))
    if work.k_aux and work.dead:
        k = min(work.k_aux, work.dead)
        found += _use(work, k, -(-work.dead // work.feature), "aux_candidates")
    if work.feature > 1:
        others = work.feature - 1
        found.append(Exchange("b_dec", "feature", 1, 4 * work.d_model * others))
        if work.state.moments == "factored":
            found.append(Exchange("columns", "feature", 2, 2 * SUM * work.d_model * others))
    if work.ranks > 1:
        found.append(Exchange("counts", "world", 1, 5 * COUNT * (work.ranks - 1)))
    return found


def _use(work: Workload, k: int, available: int, name: str, extra: int = 0) -> list[Exchange]:
    """The exchanges of one term of the loss: candidates, partial sums, errors, pairs."""
    found, rows, feature, width = [], work.rows, work.feature, min(k, available)
    if feature > 1:
        if pays_two_rounds(k, feature, work.d_model):
            told = min(-(-2 * k // feature), width)
            found += [
                Exchange(f"{name}.bound", "feature", 2, (feature - 1) * rows * (4 * told + 4)),
                Exchange(name, "feature", 1, (feature - 1) * KEY * reaching(work, k)),
            ]
        else:
            found.append(Exchange(name, "feature", 1, (feature - 1) * rows * KEY * width))
    found += _errors(work)
    if work.data > 1:
        pairs = rows * min(k, width * feature)
        each = VALUE + INDEX + VALUE + extra * VALUE
        found.append(Exchange("pairs", "data", 3 + extra, (work.data - 1) * pairs * each))
    return found


def _in_lines(work: Workload, extra: int) -> list[Exchange]:
    """The exchanges of a choice over a batch or above a level: counts, errors, pairs with their rows.

    Over a batch, counts of values by their digits; in both cases, how many rows must be selected again.
    """
    found = []
    if work.ranks > 1:
        digits = -(-VALUE_BITS // DIGIT) if isinstance(work.sae.rule, TopOfBatch) else 0
        calls = [COUNT * (1 + (1 << DIGIT))] * digits + [COUNT]
        received = sum(2 * (work.ranks - 1) * size // work.ranks for size in calls)
        found.append(Exchange(THRESHOLD, "world", len(calls), received))
    found += _errors(work)
    if work.data > 1:
        pairs = reaching(work, work.k)
        each = INDEX + VALUE + INDEX + VALUE + extra * VALUE
        found.append(Exchange("pairs", "data", 5 + extra, (work.data - 1) * (COUNT + pairs * each)))
    return found


def _errors(work: Workload) -> list[Exchange]:
    """Partial sums to the owner of each row, and the errors to all ranks."""
    found, share = [], -(-work.rows // work.feature)
    if work.feature > 1:
        size = (work.feature - 1) * share * work.d_model * 4
        found += [Exchange("reconstruction", "feature", 1, size), Exchange("errors", "feature", 1, size)]
    if work.data > 1:
        found.append(Exchange("errors", "data", 1, (work.data - 1) * work.rows * work.d_model * 4))
    return found


def reaching(work: Workload, k: int) -> int:
    """Keys of one part that reach the bound of two rounds, or its pairs in lines: k a row over all parts."""
    return -(-work.rows * k // work.feature)


def loading(work: Workload) -> list[Exchange]:
    """The exchanges that bring the batch to all ranks; it is read once, in as many parts as there are readers.

    Ranks without a lane receive as much as others, since parts are padded to the longest.
    """
    if work.ranks == 1:
        return []
    part = -(-work.batch // min(work.ranks, work.lanes))
    row = work.d_model * (2 if work.stored_bytes == 1 else work.stored_bytes) + COUNT  # and its place
    others = work.ranks - 1
    return [
        Exchange("roll_call", "world", 1, 6 * COUNT * others),
        Exchange("batch", "world", 2, others * part * row),
    ]


def by_name(work: Workload) -> dict[str, tuple[int, int]]:
    """(calls, bytes) of a step by name of the exchange, as `Mesh.traffic` adds them up over axes."""
    sums: dict[str, tuple[int, int]] = {}
    for exchange in exchanges(work):
        calls, size = sums.get(exchange.name, (0, 0))
        sums[exchange.name] = (calls + exchange.calls, size + exchange.bytes)
    return sums


def dense_gradient_bytes(work: Workload) -> float:
    """Bytes of a ring all-reduce of dense fp32 gradients over the data axis instead: 2 (D - 1) / D of them."""
    return sum(2 * (work.data - 1) / work.data * 4 * 2 * member.latents * work.d_model for member in work.members)
