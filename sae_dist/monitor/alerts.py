"""Finds what is wrong with a run from the lines of metrics.jsonl. Pure: times and lines are given."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sae_dist.monitor.config import AlertsConfig

Entry = Mapping[str, Any]  # a line of metrics.jsonl


class Alert(NamedTuple):
    """A condition that holds now. `name` says which: it is one alert for as long as it holds."""

    name: str
    text: str


def decide(history: Sequence[Entry], config: AlertsConfig, *, now: float, disk_free: float | None) -> list[Alert]:
    """What is amiss at the time `now`.

    `history` are lines of this attempt, the oldest first: that of its start, and those of training and harvest as far
    back as the longest time of the configuration. `disk_free` is a share, None where it is not known.
    """
    training = [entry for entry in history if "phase" not in entry]
    harvest = [entry for entry in history if entry.get("phase") == "harvest"]
    found = [
        *_starved(training, config, now), *_stalled(history, config, now), *_no_commit(harvest, config, now),
        *_dead(training, config), *_cost(training, config),
    ]  # fmt: skip
    if disk_free is not None and config.disk_free is not None and disk_free < config.disk_free:
        found.append(Alert("disk", f"{disk_free:.1%} of the disk of out= is left; free space before the run needs it"))
    return found


class Episodes:
    """Tells what is new: an alert is raised when its condition begins to hold, and not again before that has ended."""

    def __init__(self) -> None:
        self._holding: set[str] = set()

    def new(self, alerts: Sequence[Alert]) -> list[Alert]:
        before, self._holding = self._holding, {alert.name for alert in alerts}
        return [alert for alert in alerts if alert.name not in before]


def _starved(training: Sequence[Entry], config: AlertsConfig, now: float) -> Iterator[Alert]:
    """The share of the last starved_s that training has waited for rows, by its lines at both ends."""
    if config.starved is None or not training:
        return
    newest = training[-1]
    earlier = [entry for entry in training if newest["time"] - entry["time"] >= config.starved_s]
    if not earlier or now - newest["time"] > config.starved_s:
        return
    seconds = newest["time"] - earlier[-1]["time"]
    share = (newest["starved_seconds"] - earlier[-1]["starved_seconds"]) / seconds
    if share > config.starved:
        yield Alert(
            "starved",
            f"training has waited for rows {share:.0%} of the last {seconds:.0f} s; give it more replicas "
            "(harvest.replicas), or storage that reads faster",
        )


def _stalled(history: Sequence[Entry], config: AlertsConfig, now: float) -> Iterator[Alert]:
    """No line from anybody while there is something to do: a run at work has one every few seconds or steps."""
    if config.stalled_s is None or not history or not _at_work(history):
        return
    silent = now - max(entry["time"] for entry in history)
    if silent > config.stalled_s:
        yield Alert("stalled", f"metrics.jsonl has had no line for {silent:.0f} s; `sae-dist status` says what it does")


def _at_work(history: Sequence[Entry]) -> bool:
    """Whether steps are left, or units where nothing is trained: evaluation and pages have no lines to wait for."""
    newest = {entry.get("phase", "train"): entry for entry in history}
    steps, units = newest.get("start", {}).get("steps"), newest.get("harvest")
    if steps is None:
        return units is None or units["units"] < units["of"]
    return newest.get("train", {"step": 0})["step"] < steps


def _no_commit(harvest: Sequence[Entry], config: AlertsConfig, now: float) -> Iterator[Alert]:
    """No new unit, though units are left and nobody has told the replicas to wait for readers."""
    if config.no_commit_s is None or not harvest or harvest[-1]["units"] >= harvest[-1]["of"]:
        return
    newest = harvest[-1]
    since = next(entry for entry in harvest if entry["units"] == newest["units"])
    working_s = now - since["time"] - (newest["held_s"] - since["held_s"])
    if working_s > config.no_commit_s:
        yield Alert(
            "no_commit",
            f"no unit has been committed for {working_s:.0f} s of work, at {newest['units']} of {newest['of']}; see "
            "whether the replicas live and the store takes what they write",
        )


def _dead(training: Sequence[Entry], config: AlertsConfig) -> Iterator[Alert]:
    if config.dead is None or not training:
        return
    for name, value in training[-1].items():
        prefix, _, figure = name.rpartition("/")
        if figure == "dead_fraction" and value is not None and value > config.dead:
            of = f"{prefix}: " if prefix else ""
            yield Alert(f"{prefix}/dead", f"{of}{value:.0%} of the latents are dead; lower train.lr or sae.n_latents")


def _cost(training: Sequence[Entry], config: AlertsConfig) -> Iterator[Alert]:
    if config.cost is None or config.price_per_hour is None or not training:
        return
    spent = training[-1]["seconds"] / 3600 * config.price_per_hour
    if spent > config.cost:
        yield Alert("cost", f"training has cost {spent:.2f}, more than alerts.cost={config.cost:g}")
