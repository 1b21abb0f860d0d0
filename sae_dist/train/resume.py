"""Where a training starts: at its newest checkpoint, else with untrained dictionaries."""

import logging
from typing import Annotated, NamedTuple

from pydantic import Field

from sae_dist.config import UserError, load
from sae_dist.sae.scale import Scales
from sae_dist.shards.records import CorruptData
from sae_dist.train import guard as guards
from sae_dist.train.batches import Batches
from sae_dist.train.checkpoint import Checkpoint
from sae_dist.train.parallel.collectives import broadcast_number
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints
from sae_dist.train.state import RowSource, TrainState, from_checkpoint, initial_state, owned_rows
from sae_dist.train.warm_start import StartedFrom

logger = logging.getLogger(__name__)


class StartPoint(NamedTuple):
    """The state that an attempt starts with."""

    state: TrainState
    folder: str = ""  # the checkpoint that it was read from


def resume(batches: Batches, checkpoints: Checkpoints) -> StartPoint:
    """The newest checkpoint's state, or that of untrained dictionaries.

    UserError where the folder holds checkpoints of another run and none of this one.
    """
    task, mesh = batches.task, batches.mesh
    saved = checkpoints.latest(owned_rows(mesh, task.members))
    if saved is not None:
        _check_facts(saved, checkpoints)
        state = from_checkpoint(saved, task.members, task.config, mesh)
        if mesh.is_rank_0:
            logger.info("resuming at step %d of %d", state.step, task.config.n_steps)
        return StartPoint(state, saved.folder)
    if (facts := checkpoints.facts_of_another_run()) is not None:
        here, there = task.source(None), RowSource(*facts["source"])
        if (there.store, there.hook) != (here.store, here.hook):
            raise UserError(
                f"out={task.out} was trained on {there.hook} of store {there.store}, not on {here.hook} of "
                f"{here.store} ({task.store.storage.uri}); choose another out="
            )
        raise UserError(
            f"train.checkpoints={checkpoints.storage.uri} holds another run's checkpoints; give each run a place of "
            "its own"
        )
    manifest = None
    if not task.live:
        version = task.store.snapshot(task.checkpoints).version if mesh.is_rank_0 else 0
        manifest = broadcast_number(mesh, version, name="manifest")
    x, target = batches.sample(manifest)
    source, sides = task.source(manifest), task.sides
    model = task.store.meta.model
    return StartPoint(
        initial_state(x, target, task.members, task.config, mesh, source=source, sides=sides, model=model)
    )


class _Facts(NamedTuple):
    """The facts of a checkpoint besides guards and identities."""

    scales: Scales
    variance: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    order_hash: Annotated[int, Field(ge=0, lt=1 << 64)]
    units_done: Annotated[int, Field(ge=0)]
    source: RowSource
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _check_facts(saved: Checkpoint, checkpoints: Checkpoints) -> None:
    """CorruptData where a checkpoint's facts are not valid."""
    facts = dict(saved.facts)
    try:
        for name in [name for name in facts if name.endswith("guard")]:
            guards.from_facts(facts.pop(name))
        for name in [name for name in facts if name.endswith("identity")]:
            load(dict[str, str | int], facts.pop(name))
        for name in [name for name in facts if name.endswith("started_from")]:
            load(StartedFrom, facts.pop(name))
        load(_Facts, facts)
    except UserError as error:
        raise CorruptData(
            f"checkpoint {checkpoints.storage.uri}/{saved.folder}: {error}; remove that folder to resume from the one "
            "before"
        ) from None
