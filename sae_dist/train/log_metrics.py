"""The metrics of a log line: sums over the whole mesh since the last line, and rates of this attempt."""

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae_dist.monitor.panels import BINS_A_DECADE, DENSE, EDGES, HISTOGRAM
from sae_dist.sae.variants.interface import Top
from sae_dist.train.learner import Learner, StepOutcome
from sae_dist.train.norms import weight_norms
from sae_dist.train.parallel.collectives import ordered_sum
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.step import MeshStep
from sae_dist.train.state import TrainState


class IntervalSums(NamedTuple):
    """Sums of one dictionary since the last log line, without skipped steps."""

    squared_error: float = 0.0
    active: float = 0.0
    rows: int = 0
    fired: Int[Tensor, " here"] | None = None  # rows on which each latent of this rank was active
    gradient_norm: float | None = None  # of the last step

    def add(self, learned: StepOutcome, rows: int) -> "IntervalSums":
        if learned.decision != "step":
            return self
        return IntervalSums(
            self.squared_error + learned.squared_error, self.active + learned.active, self.rows + rows,
            learned.fired if self.fired is None else self.fired.add_(learned.fired), learned.gradient_norm,
        )  # fmt: skip


def dictionary_metrics(
    sums: IntervalSums, learner: Learner, state: TrainState, *, lr: float, tokens: int
) -> dict[str, Any]:
    """Metrics of one dictionary after `tokens` tokens, with its prefix; all ranks call this together."""
    rows, guard, may_be_dead = sums.rows, learner.guard, tokens >= learner.sae.shard.dead_after_tokens
    own = {
        "lr": lr,
        "fvu": sums.squared_error / (rows * state.variance) if rows else None,  # every step was skipped
        "l0": sums.active / rows if rows else None,
        "dead_fraction": learner.sae.dead_fraction() if may_be_dead else None,  # before, no latent can be dead
        "skipped_steps": guard.skipped,
        "loss_spikes": guard.spikes,
        "roll_backs": guard.roll_backs,
        "gradient_norm": sums.gradient_norm,
    }
    own |= _of_kind(learner.sae, state.scales.z) | weight_norms(learner.sae)
    if sums.fired is not None:
        own |= densities(learner.sae, sums.fired, rows)
    return {f"{learner.member.prefix}{name}": value for name, value in own.items()}


def densities(sae: MeshStep, fired: Int[Tensor, " here"], rows: int) -> dict[str, Any]:
    """How often latents of the whole dictionary were active in `rows` rows, on `fired` of them.

    dense_fraction: the share that was so on more than DENSE of them; silent_fraction: on none; density_histogram: the
    others by log10 of their share of the rows, over EDGES.
    """
    share = fired.double() / rows
    bins = torch.floor((share.log10() - EDGES[0]) * BINS_A_DECADE).clamp(0, len(EDGES) - 2).long()
    active = fired > 0
    counts = torch.bincount(bins[active], minlength=len(EDGES) - 1)
    here = torch.cat([torch.stack([(share > DENSE).sum(), (~active).sum()]), counts])
    dense, silent, *histogram = ordered_sum(sae.mesh, sae.mesh.feature, here, name="densities").tolist()
    return {
        "dense_fraction": dense / sae.n_latents, "silent_fraction": silent / sae.n_latents, HISTOGRAM: histogram,
    }  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What this rank has of its GPU, and how busy that is; null without one, or without the library that tells."""
    memory = utilisation = None
    if device.type == "cuda":
        memory = torch.cuda.memory_reserved(device) / 1e9
        with suppress(ModuleNotFoundError, RuntimeError):  # nvidia-ml-py, and a driver that it may ask
            utilisation = torch.cuda.utilization(device) / 100
    return {"gpu_memory_gb": memory, "gpu_utilisation": utilisation}


def _of_kind(sae: MeshStep, scale: float) -> dict[str, Any]:
    """Metrics that only some kinds of dictionary have.

    threshold: the tracked one, in the units of the store. penalty: of the last step. widened_rows: rows of this rank
    that were selected again so far, for kinds whose rows have different numbers of latents.
    """
    found: dict[str, Any] = {}
    if sae.threshold is not None:
        found["threshold"] = float(sae.threshold) / scale
    if sae.penalty is not None:
        found["penalty"] = float(sae.penalty.value)
    return found if isinstance(sae.sae.rule, Top) else found | {"widened_rows": sae.widened}


def run_metrics(state: TrainState, start: TrainState, batch: int, starved_s: float, mesh: Mesh) -> dict[str, Any]:
    """Tokens a second of this attempt, and the share of its time spent waiting for rows and for other ranks.

    seconds: of the training, over all attempts. starved_seconds: of this attempt, waiting for rows.
    """
    seconds = max(state.seconds - start.seconds, 1e-9)
    exchanging = sum(traffic.seconds for traffic in list(mesh.traffic.values()))
    return {
        "order_hash": f"{state.order_hash:016x}",
        "tokens": state.step * batch,
        "tokens_per_second": (state.step - start.step) * batch / seconds,
        "starved_fraction": starved_s / seconds,
        "starved_seconds": round(starved_s, 3),
        "seconds": state.seconds,
    } | ({"exchange_fraction": exchanging / seconds} if mesh.world.size > 1 else {})
