"""Bytes that a rank receives in one step, exchange by exchange; `parallel.exchange` counts the same at run time."""

from typing import NamedTuple

from sae_dist.plan.workload import Workload


class Exchange(NamedTuple):
    """One kind of collective of a step."""

    name: str  # as in `Mesh.moved`
    axis: str  # data, feature or both
    ranks: int  # of a group
    calls: int  # in a step
    bytes: float  # received by the rank that receives most, in a step


def exchanges(work: Workload) -> list[Exchange]:
    """The exchanges of a step on this mesh, none where an axis has one rank."""
    data, feature, d = work.data, work.feature, work.d_model
    found = []
    if feature > 1:
        part = -(-work.rows // feature)
        found += [
            Exchange("pairs", "feature", feature, 1, (feature - 1) * work.rows * min(work.k, work.latents) * 12),
            Exchange("reconstruction", "feature", feature, 1, (feature - 1) * part * d * 4),
        ]
    if work.ranks > 1:
        part = -(-work.rows // feature)
        found += [Exchange("errors", "both", work.ranks, 1, (work.ranks - 1) * part * d * 4)]
    if data > 1:
        found += [
            Exchange("rows", "data", data, 1, (data - 1) * work.rows * d * 2),
            Exchange("chosen", "data", data, 1, (data - 1) * work.rows * work.k * 12),
        ]
    return found


def dense_gradient_bytes(work: Workload) -> float:
    """What a ring all-reduce of fp32 gradients over the data axis would bring instead: 2 (D - 1) / D of them."""
    return 2 * (work.data - 1) / work.data * 4 * 2 * work.latents * work.d_model
