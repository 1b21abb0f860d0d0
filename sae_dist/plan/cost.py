"""What a run costs outside its steps: the store, the language model's forward passes, device hours, money."""

from typing import NamedTuple

from sae_dist.plan.machine import Machine
from sae_dist.plan.workload import Workload

COLUMNS = 16  # bytes a row besides its activations: doc 8, pos 4, token 4 (shards/FORMAT.md)
SCALE = 4  # bytes a row more where the store is quantised


class HarvestedModel(NamedTuple):
    """The size of the language model that is harvested."""

    parameters: float  # of the layers up to the hook point
    context: int  # positions of a sequence
    kept: float  # share of positions that become rows


class Cost(NamedTuple):
    """Amounts of a whole run; prices are None where no rate was given."""

    store_rows: int
    store_bytes: float
    harvest_flop: float  # 0 where the language model is unknown
    harvest_device_hours: float
    train_device_hours: float
    device_price: float | None
    storage_price_month: float | None


def store_bytes(rows: int, d_model: int, stored_bytes: int) -> float:
    """Bytes of `rows` stored rows: activations, three columns, and a scale where an element is one byte."""
    return float(rows) * (d_model * stored_bytes + COLUMNS + (SCALE if stored_bytes == 1 else 0))


def harvest_flop(harvested: HarvestedModel, rows: int) -> float:
    """2 N FLOP a position up to the hook point (Kaplan et al. 2020, sec. 2.1), without attention's own products."""
    return 2.0 * harvested.parameters * rows / harvested.kept


def cost(
    work: Workload,
    machine: Machine,
    harvested: HarvestedModel | None,
    *,
    tokens_per_second: float,
    storage_tb_month: float | None,
) -> Cost:
    """The cost of a run that harvests `work.store_rows` once and takes `work.steps` steps on the mesh."""
    flop = harvest_flop(harvested, work.store_rows) if harvested else 0.0
    harvest_hours = flop / machine.harvest / 3600
    devices = min(work.ranks, machine.devices) if machine.backend != "triton" else work.ranks
    train_hours = work.steps * work.batch / tokens_per_second * devices / 3600
    size = store_bytes(work.store_rows, work.d_model, work.stored_bytes)
    rate = machine.device_hour
    return Cost(
        work.store_rows, size, flop, harvest_hours, train_hours,
        None if rate is None else rate * (harvest_hours + train_hours),
        None if storage_tb_month is None else storage_tb_month * size / 1e12,
    )  # fmt: skip
