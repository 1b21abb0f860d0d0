"""Bytes that a rank receives in one step, exchange by exchange, as `train.parallel` makes them and `Mesh.moved` counts.

The figures are those of rank 0, which has the largest part of everything. What a step decides by its data, how many
keys reach the bound of a selection in two rounds, is taken as k a row in all, evenly over the parts.
"""

from typing import Literal, NamedTuple

from sae_dist.plan.workload import Workload
from sae_dist.train.parallel.select import pays_two_rounds

KEY, VALUE, INDEX, COUNT = 8, 4, 4, 8  # bytes of a (value, index) key, a value or d_z, an index, a count


class Exchange(NamedTuple):
    """One kind of collective of a step."""

    name: str  # as in `Mesh.moved`
    axis: Literal["data", "feature", "world"]
    calls: int  # in a step
    bytes: int  # received in a step


def exchanges(work: Workload) -> list[Exchange]:
    """The exchanges of a step on this mesh, none where an axis has one rank; all dictionaries of the pass make them."""
    if work.also:
        return [exchange for member in work.members for exchange in exchanges(member)]
    found = [*_use(work, work.k, work.latents, "candidates")]
    if work.k_aux and work.dead:
        k = min(work.k_aux, work.dead)
        found += _use(work, k, -(-work.dead // work.feature), "aux_candidates")
    if work.feature > 1:
        others = work.feature - 1
        found.append(Exchange("b_dec", "feature", 1, 4 * work.d_model * others))
    if work.ranks > 1:
        found.append(Exchange("counts", "world", 1, 5 * COUNT * (work.ranks - 1)))
    return found


def _use(work: Workload, k: int, available: int, name: str) -> list[Exchange]:
    """One use of latents in the loss: who is chosen, the sum of the partial sums, what it leaves, the chosen pairs."""
    found, rows, feature, width = [], work.rows, work.feature, min(k, available)
    share = -(-rows // feature)  # rows whose sums this rank adds up
    if feature > 1:
        if pays_two_rounds(k, feature, work.d_model):
            told = min(-(-2 * k // feature), width)
            found += [
                Exchange(f"{name}.bound", "feature", 2, (feature - 1) * rows * (4 * told + 4)),
                Exchange(name, "feature", 1, (feature - 1) * KEY * reaching(work, k)),
            ]
        else:
            found.append(Exchange(name, "feature", 1, (feature - 1) * rows * KEY * width))
        found += [
            Exchange("reconstruction", "feature", 1, (feature - 1) * share * work.d_model * 4),
            Exchange("errors", "feature", 1, (feature - 1) * share * work.d_model * 4),
        ]
    if work.data > 1:
        others = work.data - 1
        chosen = min(k, width * feature)
        found += [
            Exchange("errors", "data", 1, others * rows * work.d_model * 4),
            Exchange("pairs", "data", 3, others * rows * chosen * (VALUE + INDEX + VALUE)),
        ]
    return found


def reaching(work: Workload, k: int) -> int:
    """Keys of one part that reach the bound in the second of two rounds: k a row in all."""
    return -(-work.rows * k // work.feature)


def feeding(work: Workload) -> list[Exchange]:
    """How the batch comes to every rank: read once on the whole mesh, in as many parts as there are readers.

    A rank without a lane to read is sent as much as one with: parts are padded to the longest.
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
    """(calls, bytes) of a step by name of the exchange, as `Mesh.moved` adds them up over axes."""
    sums: dict[str, tuple[int, int]] = {}
    for exchange in exchanges(work):
        calls, size = sums.get(exchange.name, (0, 0))
        sums[exchange.name] = (calls + exchange.calls, size + exchange.bytes)
    return sums


def dense_gradient_bytes(work: Workload) -> float:
    """What a ring all-reduce of fp32 gradients over the data axis would bring instead: 2 (D - 1) / D of them."""
    return sum(2 * (work.data - 1) / work.data * 4 * 2 * member.latents * work.d_model for member in work.members)
