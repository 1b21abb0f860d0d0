"""The plan of a run: memory, traffic, time, storage and price. UserError for what cannot run."""

import dataclasses
from typing import Any, NamedTuple

from sae_dist.config import UserError, to_dict
from sae_dist.plan.cost import Cost, HarvestedModel, cost
from sae_dist.plan.machine import Machine
from sae_dist.plan.memory import MemoryItem, memory
from sae_dist.plan.seconds import Phase, n_machines, phases, reading_s, shared_by
from sae_dist.plan.traffic import Exchange, dense_gradient_bytes, exchanges, loading
from sae_dist.plan.workload import Workload, check

MOST_RANKS = 1 << 14  # a search ends here: no cluster is larger


class MeshEstimate(NamedTuple):
    """A mesh for a run, with its memory and speed."""

    data: int
    feature: int
    machines: int
    rank_bytes: float
    tokens_per_second: float


class Plan(NamedTuple):
    """The plan; figures of a rank are those of the largest rank."""

    work: Workload
    machine: Machine
    memory: list[MemoryItem]
    device_bytes: float  # needed on one device
    host_bytes: float  # needed beside the devices of one machine
    exchanges: list[Exchange]
    dense_gradient_bytes: float  # what reducing dense gradients over the data axis would move instead
    phases: list[Phase]
    step_s: float
    reading_s: float
    tokens_per_second: float
    bound_by: str
    machines: int
    wall_hours: float
    smallest: MeshEstimate  # the fewest ranks with enough memory
    alternatives: list[MeshEstimate]  # other splits of the same number of ranks that fit, fastest first
    cost: Cost


def plan(
    work: Workload, machine: Machine, harvested: HarvestedModel | None = None, *, storage_tb_month: float | None = None
) -> Plan:
    """The plan; UserError, with the cure, when the mesh cannot hold the run or leaves a rank without work."""
    check(work)
    parts, step = memory(work, machine), step_s(work, machine)
    smallest = smallest_mesh(work, machine)
    device, host = bytes_needed(work, machine)
    refuse_what_does_not_fit(work, machine, smallest)
    speed = work.batch / step
    return Plan(
        work=work,
        machine=machine,
        memory=parts,
        device_bytes=device,
        host_bytes=host,
        exchanges=loading(work) + exchanges(work),
        dense_gradient_bytes=dense_gradient_bytes(work),
        phases=phases(work, machine),
        step_s=step,
        reading_s=reading_s(work, machine),
        tokens_per_second=speed,
        bound_by=bound_by(work, machine),
        machines=n_machines(work, machine),
        wall_hours=work.steps * step / 3600,
        smallest=smallest,
        alternatives=splits(work, machine),
        cost=cost(work, machine, harvested, tokens_per_second=speed, storage_tb_month=storage_tb_month),
    )


def step_s(work: Workload, machine: Machine) -> float:
    """Seconds of a step: its phases one after the other, or reading where that takes longer."""
    return max(sum(phase.seconds for phase in phases(work, machine)), reading_s(work, machine))


def bound_by(work: Workload, machine: Machine) -> str:
    """What takes the largest share of a step; exchanges together are the network."""
    seconds: dict[str, float] = {}
    for phase in phases(work, machine):
        name = "the network" if phase.name.startswith("exchange") else phase.name
        seconds[name] = seconds.get(name, 0.0) + phase.seconds
    reading = reading_s(work, machine)
    return "reading" if reading > sum(seconds.values()) else max(seconds, key=lambda name: seconds[name])


def bytes_needed(work: Workload, machine: Machine) -> tuple[float, float]:
    """Bytes on one device, and host bytes of one machine; without accelerators all bytes are of the first kind."""
    parts = memory(work, machine)
    ranks = min(machine.devices, work.ranks)
    on_device = sum(part.bytes for part in parts if not part.host) * shared_by(work, machine)
    return on_device, sum(part.bytes for part in parts if part.host) * ranks


def fits(work: Workload, machine: Machine) -> bool:
    device, host = bytes_needed(work, machine)
    return device <= machine.memory and host <= machine.host_memory


def smallest_mesh(work: Workload, machine: Machine) -> MeshEstimate:
    """The fewest feature ranks with enough memory, with one data rank; UserError where no number is enough."""
    feature = 1
    most = min(member.n_latents for member in work.members)
    while feature <= min(MOST_RANKS, most):
        tried = work.on_mesh(data=1, feature=feature)
        if fits(tried, machine):
            return _mesh(tried, machine)
        if machine.backend != "triton":
            break  # more ranks on the same memory need more, not less
        feature += 1
    one = bytes_needed(work.on_mesh(data=1, feature=min(feature, most)), machine)[0]
    others = f" and the {len(work.others)} of more_dictionaries" if work.others else ""
    raise UserError(
        f"sae.n_latents={work.n_latents} x d_model={work.d_model}{others} with train.batch={work.batch} needs "
        f"{gigabytes(one)} on a device of machine={machine.name}, which has {gigabytes(machine.memory)}, however it is "
        f"split; use fewer latents,{' fewer dictionaries,' if work.others else ''} a smaller train.batch or a larger "
        "machine"
    )


def refuse_what_does_not_fit(work: Workload, machine: Machine, smallest: MeshEstimate) -> None:
    device, host = bytes_needed(work, machine)
    if device > machine.memory:
        raise UserError(
            f"mesh.data={work.data} x mesh.feature={work.feature} needs {gigabytes(device)} on a device of machine="
            f"{machine.name}, which has {gigabytes(machine.memory)}; the smallest mesh that fits is mesh.data=1 "
            f"mesh.feature={smallest.feature} ({smallest.machines} machine{'s' * (smallest.machines > 1)})"
        )
    if host > machine.host_memory:
        raise UserError(
            f"a machine={machine.name} needs {gigabytes(host)} beside its devices and has "
            f"{gigabytes(machine.host_memory)}; use more machines (mesh.feature) or a smaller order.window"
        )


def splits(work: Workload, machine: Machine) -> list[MeshEstimate]:
    """Every split of this many ranks that fits, the fastest first."""
    found = []
    for feature in range(1, work.ranks + 1):
        tried = work.on_mesh(data=work.ranks // feature, feature=feature)
        if work.ranks % feature == 0 and tried.data <= work.lanes and fits(tried, machine):
            found.append(_mesh(tried, machine))
    return sorted(found, key=lambda mesh: -mesh.tokens_per_second)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for scripts."""

    def plain(value: object) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {name: plain(own) for name, own in value._asdict().items()}  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(value):
            return to_dict(value)
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return plain(plan)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _mesh(work: Workload, machine: Machine) -> MeshEstimate:
    parts = sum(part.bytes for part in memory(work, machine) if not part.host)
    return MeshEstimate(work.data, work.feature, n_machines(work, machine), parts, work.batch / step_s(work, machine))
