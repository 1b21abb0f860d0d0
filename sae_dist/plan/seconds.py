"""Seconds of a step: how much of each kind of work there is, over the rate at which the machine does it."""

from typing import Literal, NamedTuple

from sae_dist.plan.machine import Backend, Link, Machine
from sae_dist.plan.traffic import exchanges, loading
from sae_dist.plan.workload import Workload

Kind = Literal["product", "select", "gather", "stream", "step"]
NAMES: dict[Kind, tuple[str, str]] = {  # what a person reads, and the unit
    "product": ("the encoder's product", "FLOP"),
    "select": ("the search for the top k", "values"),
    "gather": ("gathers: decode, d_z, gradients", "B"),
    "stream": ("the optimiser's traffic", "B"),
    "step": ("launches and the host", ""),
}
ENCODER, DECODER = 26, 24  # bytes a weight that the fused updates move (kernels/README.md)
DENSE = 100  # bytes a weight with plain torch: gradients are stored, and some ten passes run over each matrix
# Costs of plain torch, which compact states use, on an accelerator: estimated from data sheets, not measured.
FP32_PRODUCT = 16  # times a product on matrix units in bf16: 989 to 67 TFLOP/s on an H100, 312 to 19.5 on an A100
SEARCH = 80  # bytes a pre-activation: written, and read and written again for relu, keys and the top k


class Phase(NamedTuple):
    """One kind of work of one rank in one step."""

    name: str
    amount: float
    unit: str
    seconds: float


def phases(work: Workload, machine: Machine) -> list[Phase]:
    """The phases of a rank's step, one after the other; reading runs in parallel (`reading_s`)."""
    share, rates = shared_by(work, machine), machine.rates
    per_unit: dict[Kind, float] = {
        "product": share / rates.product,
        "select": share / rates.select if rates.select else 0.0,
        "gather": share / rates.gather,
        "stream": share / rates.stream,
        "step": rates.step_s,
    }
    own = amounts(work, machine.backend)
    found = [Phase(*NAMES[kind][:1], own[kind], NAMES[kind][1], own[kind] * cost) for kind, cost in per_unit.items()]
    for e in loading(work) + exchanges(work):
        link = joined_by(e.axis, work, machine)
        seconds = e.calls * link.latency_s + share * e.bytes / link.bytes_per_s
        found.append(Phase(f"exchange: {e.name} ({e.axis})", e.bytes, "B", seconds))
    return found


def amounts(work: Workload, backend: Backend) -> dict[Kind, float]:
    """How much of each kind of work the largest rank has in a step, for all dictionaries of the pass together.

    product: 2 rows d_model latents, one dense product, which is what exact selection costs. gather: decode reads k rows
    of W_dec, d_z again, both gradients k rows of errors and of x; a feature rank does so for its own latents, k / F of
    a row's in the mean. stream: the optimiser's passes over this rank's weights. Compact state moves fewer bytes and
    takes about as long on a CPU; on an accelerator plain torch computes it: a product of FP32_PRODUCT times the FLOP,
    and the search for the top k in memory.
    """
    if work.others:
        each = [amounts(member, backend) for member in work.members]
        return {kind: sum(own[kind] for own in each) for kind in NAMES}
    weights, d = float(work.latents * work.d_model), work.d_model
    pairs = work.batch * work.k / work.feature
    decoded = work.rows * work.k / work.feature
    plain = work.kernels(backend) == "torch"
    fallen_back = plain and backend == "triton"
    return {
        "product": 2.0 * work.rows * d * work.latents * (FP32_PRODUCT if fallen_back else 1),
        "select": float(work.rows * work.latents),
        "gather": decoded * 4 * d + pairs * (4 * d + 4 * d + (4 if plain else 2) * d),
        "stream": weights * (2 * DENSE if plain else ENCODER + DECODER)
        + (SEARCH * work.rows * work.latents if fallen_back else 0),
        "step": 1.0,
    }


def shared_by(work: Workload, machine: Machine) -> float:
    """Ranks that share one device: one per accelerator; on CPUs all ranks of the machine share its cores."""
    return 1.0 if machine.backend == "triton" else float(work.ranks)


def joined_by(axis: str, work: Workload, machine: Machine) -> Link:
    """The link of an axis. Feature ranks are neighbours, so they share a machine while it has devices."""
    span = work.feature if axis == "feature" else work.ranks
    return machine.link if machine.backend != "triton" or span <= machine.devices else machine.network


def reading_s(work: Workload, machine: Machine) -> float:
    """Seconds in which a machine reads its share of a batch from object storage."""
    return work.batch * work.d_model * work.stored_bytes / n_machines(work, machine) / machine.read


def n_machines(work: Workload, machine: Machine) -> int:
    """Machines that the mesh takes."""
    return -(-work.ranks // machine.devices) if machine.backend == "triton" else 1
