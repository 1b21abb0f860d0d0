"""What a line of the log says: sums since the last line, over the whole mesh, and rates of this attempt."""

from typing import Any, NamedTuple

from sae_dist.train.state import TrainState


class Window(NamedTuple):
    """Sums since the last line of the log; steps that were left out do not count."""

    squared_error: float = 0.0
    active: float = 0.0
    rows: int = 0

    def add(self, squared_error: float, active: float, rows: int) -> "Window":
        return Window(self.squared_error + squared_error, self.active + active, self.rows + rows)


def figures(window: Window, state: TrainState) -> dict[str, Any]:
    """Loss and latents; all ranks must ask, or none."""
    rows = max(window.rows, 1)
    return {
        "fvu": window.squared_error / (rows * state.variance),
        "l0": window.active / rows,
        "dead_fraction": state.sae.dead_fraction(),
        "skipped_steps": state.guard.skipped,
        "loss_spikes": state.guard.spikes,
        "roll_backs": state.guard.roll_backs,
        "order_hash": f"{state.order_hash:016x}",
    } | ({} if state.sae.variant == "topk" else _of_batches(state))


def _of_batches(state: TrainState) -> dict[str, Any]:
    """BatchTopK: the threshold, in the units of the store, and rows of this rank that were selected twice so far."""
    return {"threshold": float(state.sae.threshold) / state.scale, "widened_rows": state.sae.widened}


def rates(state: TrainState, begun: TrainState, batch: int, starved_s: float) -> dict[str, Any]:
    """Tokens a second of this attempt, and the share of its time spent waiting for rows and for other ranks."""
    seconds = max(state.seconds - begun.seconds, 1e-9)
    exchanging = sum(moved.seconds for moved in list(state.sae.mesh.moved.values()))
    return {
        "tokens": state.step * batch,
        "tokens_per_second": (state.step - begun.step) * batch / seconds,
        "starved_fraction": starved_s / seconds,
    } | ({"exchange_fraction": exchanging / seconds} if state.sae.mesh.world.size > 1 else {})
