"""Memory, traffic, tokens/s, storage and price of a run before it is started; every key of `sae-dist run` may be given.

sae-dist plan target=34M machine=h100 mesh.feature=128    a known size on a kind of machine
sae-dist plan machine=here sae.n_latents=65536            on this machine, measured by a short probe
Exit code 2, with the cure, when the run cannot be held. json=true for scripts.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from sae_dist import storage
from sae_dist.config import frozen, load, to_dict
from sae_dist.plan import plan as planning
from sae_dist.plan import probe
from sae_dist.plan.cost import HarvestedModel
from sae_dist.plan.machine import Machine
from sae_dist.plan.plan import Plan, gigabytes
from sae_dist.plan.workload import Workload, workload
from sae_dist.service.config import RunConfig
from sae_dist.service.gpu_shares import describe_shares, share_gpus
from sae_dist.service.placement import Node
from sae_dist.shards import hooks, stores
from sae_dist.shards.format import ELEMENTS
from sae_dist.shards.hooks import Hooks

CONFIG = RunConfig  # planning adds the keys in conf/plan.yaml
MACHINE_KEYS = ("machine", "d_model", "subject_parameters", "dead_fraction", "price", "json")


@frozen
class Price:
    """Rates in one currency; null: not priced."""

    device_hour: Annotated[float, Field(ge=0)] | None
    storage_tb_month: Annotated[float, Field(ge=0)] | None


@frozen
class PlanJob:
    """What planning needs besides the run; the defaults are in conf/plan.yaml."""

    machine: Machine
    d_model: Annotated[int, Field(ge=1)] | None
    subject_parameters: Annotated[float, Field(gt=0)] | None
    dead_fraction: Annotated[float, Field(ge=0, le=1)]
    price: Price
    json: bool


def main(values: Mapping[str, Any]) -> int:
    own = {key: values[key] for key in MACHINE_KEYS}
    job = load(PlanJob, own | {"machine": _machine(values["machine"])})
    run = load(RunConfig, {key: value for key, value in values.items() if key not in MACHINE_KEYS})
    machine = job.machine
    if job.price.device_hour is not None:
        machine = load(Machine, to_dict(machine) | {"device_hour": job.price.device_hour})
    work, harvested = _workload(run, job)
    found = planning.plan(work, machine, harvested, storage_tb_month=job.price.storage_tb_month)
    if job.json:
        print(json.dumps(planning.as_json(found), indent=1))
    else:
        show(found, run, Console())
    return 0


def _machine(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description as YAML has it; `here` is measured, and keys given on the command line replace what was found."""
    if values.get("name") != "here":
        return values
    given = {key: value for key, value in values.items() if key not in ("name", "probe")}
    return to_dict(probe.here(again=values.get("probe") == "again")) | given


def _workload(run: RunConfig, job: PlanJob) -> tuple[Workload, HarvestedModel | None]:
    """Sizes from the store where there is one, else from the keys, else from the language model's configuration."""
    d_model, parameters = job.d_model, job.subject_parameters
    rows, stored = _rows(run), ELEMENTS[run.harvest.dtype].stored.itemsize
    if run.store is not None and storage.open(run.store).exists("store.json"):
        meta = stores.open(storage.open(run.store)).meta
        hooks.check(Hooks(run.hooks), meta, f"store={run.store}")
        d_model, rows, stored = (
            hooks.width(meta, run.hooks),
            meta.n_units * meta.unit_rows,
            meta.element.stored.itemsize,
        )
    elif d_model is None:
        from sae_dist.model.model_size import model_size  # transformers takes seconds to import

        found = [model_size(run.model, hook) for hook in run.hooks]
        d_model = sum(of.width for of in found)
        parameters = parameters or max(of.parameters for of in found)  # those of the layers up to the last one
    kept = 1 - run.harvest.rows.drop_first / run.harvest.context
    harvested = None if parameters is None else HarvestedModel(parameters, run.harvest.context, kept)
    work, *others = (
        workload(
            member.sae, run.train, run.order, d_model=d_model, sites=len(run.hooks), data=run.mesh.data,
            feature=run.mesh.feature, dead_fraction=job.dead_fraction, store_rows=rows, stored_bytes=stored,
            slice_rows=run.harvest.slice_rows, state=member.state,
        )
        for member in run.members
    )  # fmt: skip
    return work._replace(others=tuple(others)), harvested


def _rows(run: RunConfig) -> int:
    """Rows that harvesting makes: the positions, less the first of every sequence."""
    harvest = run.harvest
    positions = harvest.tokens + harvest.heldout_tokens
    return positions * (harvest.context - harvest.rows.drop_first) // harvest.context


def show(found: Plan, run: RunConfig, console: Console) -> None:
    """The plan for people."""
    work, machine = found.work, found.machine
    for member in work.members:
        console.print(
            f"{member.n_latents:,} latents x {member.d_model:,}, k {member.k}: "
            f"{member.parameters / 1e9:,.2f} billion parameters",
            highlight=False,
        )
    console.print(
        f"batch {work.batch:,}\n{machine.name}: {found.machines} machine{'s' * (found.machines > 1)}, "
        f"mesh.data={work.data} mesh.feature={work.feature}, "
        f"{work.latents:,} latents and {work.rows:,} rows a rank",
        highlight=False,
    )
    if machine.backend == "triton":
        there = [Node(machine.name, {"CPU": math.inf, "GPU": machine.devices}, {})] * found.machines
        shares = share_gpus(there, harvest=run.harvest, mesh=run.mesh, device=run.train.device)
        said = describe_shares(shares, replicas=run.harvest.least_processes, ranks=work.ranks)
        console.print(f"on {machine.devices * found.machines} GPUs: {said}", highlight=False)
    table = _table("memory of a rank", "")
    for part in found.memory:
        table.add_row(part.name + (" (host)" if part.host else ""), gigabytes(part.bytes))
    table.add_row(f"a device holds, of {gigabytes(machine.memory)}", gigabytes(found.device_bytes))
    console.print(table)
    table = _table("time of a step", "", "")
    for phase in found.phases:
        table.add_row(phase.name, _amount(phase.amount, phase.unit), _seconds(phase.seconds))
    table.add_row("a step", "", _seconds(found.step_s))
    table.add_row("reading, beside it", "", _seconds(found.reading_s))
    console.print(table)
    table = _table("the run", "")
    table.add_row("tokens/s", f"{found.tokens_per_second:,.0f}")
    table.add_row("bound by", found.bound_by)
    table.add_row("steps", f"{work.steps:,}")
    table.add_row("training, wall hours", f"{found.wall_hours:,.1f}")
    table.add_row("training, device hours", f"{found.cost.train_device_hours:,.0f}")
    if found.cost.harvest_flop:
        table.add_row("harvesting, device hours", f"{found.cost.harvest_device_hours:,.0f}")
    table.add_row(f"store, {found.cost.store_rows:,} rows", f"{found.cost.store_bytes / 1e12:,.2f} TB")
    if found.cost.device_price is not None:
        table.add_row("price of device hours", f"{found.cost.device_price:,.0f}")
    if found.cost.storage_price_month is not None:
        table.add_row("price of the store, a month", f"{found.cost.storage_price_month:,.0f}")
    smallest = found.smallest
    table.add_row(
        "smallest mesh that fits",
        f"mesh.feature={smallest.feature}, {smallest.machines} machine{'s' * (smallest.machines > 1)}, "
        f"{smallest.tokens_per_second:,.0f} tokens/s",
    )
    best = found.alternatives[0]
    if (best.data, best.feature) != (work.data, work.feature):
        table.add_row(
            "fastest split of as many ranks",
            f"mesh.data={best.data} mesh.feature={best.feature}, {best.tokens_per_second:,.0f} tokens/s",
        )
    console.print(table)
    console.print(f"rates: {machine.source}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _amount(amount: float, unit: str) -> str:
    if unit == "step":
        return ""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if amount >= scale:
            return f"{amount / scale:,.1f} {prefix}{unit}"
    return f"{amount:,.0f} {unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
