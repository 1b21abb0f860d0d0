"""Whole trainings on one rank or on a mesh, with what the tests compare; also what a rank's process runs."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sae_dist import storage
from sae_dist.config import Stopped
from sae_dist.sae.config import SAEConfig
from sae_dist.shards import stores
from sae_dist.shards.hooks import Hooks
from sae_dist.train import loop, resume
from sae_dist.train.config import MeshConfig, TrainConfig
from sae_dist.train.guard import GuardConfig
from sae_dist.train.learner import Learner
from sae_dist.train.members import MAIN, Member
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.task import Task
from tests.train.test_loop import CONFIG, ORDER, SAE

ALL_STEPS = 10_000


class Scenario(NamedTuple):
    """One training of one process or mesh."""

    name: str  # of its folder
    data: int = 1
    feature: int = 1
    steps: int = 60
    sae: SAEConfig = SAE
    owned: bool = False  # the first latents have all of the top k
    stop_at: int = ALL_STEPS  # the last rank is asked to stop after this step
    poison_at: int = ALL_STEPS  # the last rank's decoder is not a number from this step on
    micro_batch: int | None = None
    clip_norm: float | None = None
    seed: int = 0  # of the initial weights
    lr: float | None = None
    more: tuple[Member, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        return (Member(MAIN, self.sae, self.seed, self.lr), *self.more)

    @property
    def config(self) -> TrainConfig:
        return dataclasses.replace(
            CONFIG, steps=self.steps, product="float32", micro_batch=self.micro_batch, clip_norm=self.clip_norm,
            guard=GuardConfig(max_skipped=3, max_roll_backs=1),
        )  # fmt: skip


def run(scenario: Scenario, mesh: Mesh, folder: Path, patch: Any) -> dict[str, Any]:
    """Trains `folder`/`name` on the store `folder`/store: the lines of its log, what was selected, how it ended."""
    lines: list[tuple[int, dict]] = []
    chosen: list[torch.Tensor] = []
    learn, begin = loop.train_step, resume.initial_state
    last = mesh.world.rank == mesh.world.size - 1
    done = 0

    def watched(learner: Learner, config: Any, x: torch.Tensor, **more: Any) -> Any:
        shard, first = learner.sae.shard, learner.sae.latents.start
        save = type(shard.stages).save_for_backward_

        def watched_terms(rows: torch.Tensor, terms: Any, linear: Any = None) -> None:
            for number, term in enumerate(terms):
                row, place = term.selected.there.nonzero(as_tuple=True)
                latent = term.selected.indices[row, place] + first
                chosen.append(torch.stack([torch.full_like(row, n) for n in (done, number)] + [row, latent], 1))
            save(shard.stages, rows, terms, linear)

        shard.stages.save_for_backward_ = watched_terms
        if last and done == scenario.poison_at:
            shard.W_dec[0] = torch.nan
        return learn(learner, config, x, **more)

    def set_phase(step: int, _: str) -> None:
        nonlocal done
        done = step

    def started(*args: Any, **more: Any) -> Any:
        state = begin(*args, **more)
        if scenario.owned:
            learner, *_ = state.learners
            here = learner.sae.latents
            learner.sae.shard.b_enc[max(0, -here.start) : max(scenario.sae.k + 1 - here.start, 0)] += 5
        return state

    patch(loop, "train_step", watched)
    patch(resume, "initial_state", started)
    store = stores.open(storage.open(str(folder / "store")))
    try:
        task = Task(store, Hooks(("x",)), scenario.members, scenario.config, ORDER, seed=0, out=folder / scenario.name)
        trained = loop.train(
            task, mesh, log=lambda *entry: lines.append(entry), set_phase=set_phase,
            stop=lambda: last and done >= scenario.stop_at,
        )  # fmt: skip
        ended = trained.order_hash
    except Stopped as stopped:
        ended = str(stopped)
    finally:
        patch(loop, "train_step", learn)
        patch(resume, "initial_state", begin)
    return {"lines": lines, "chosen": torch.cat(chosen) if chosen else None, "ended": ended}


def main(folder: Path, rank: int, scenarios: list[Scenario]) -> None:
    """One rank of the meshes of all scenarios, which have as many ranks."""
    torch.set_num_threads(1)
    world = scenarios[0].data * scenarios[0].feature
    shared = dist.FileStore(str(folder / f"meeting-{scenarios[0].name}-{world}"), world)
    for number, scenario in enumerate(scenarios):
        config = MeshConfig(data=scenario.data, feature=scenario.feature, collective_timeout_s=120)
        mesh = connect(config, rank=rank, world=world, device="cpu", store=dist.PrefixStore(str(number), shared))
        torch.save(run(scenario, mesh, folder, setattr), folder / f"{scenario.name}.{rank}.pt")
        dist.barrier()
        mesh.close()
