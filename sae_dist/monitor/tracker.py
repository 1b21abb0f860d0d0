"""What every tracker can do, and how the lines of metrics.jsonl come to it: live and in `sync` in one way."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from sae_dist.monitor.metrics import by_step
from sae_dist.monitor.panels import of_dictionary
from sae_dist.monitor.tracked import Artifact, JobType, TrackedRun


class Tracker(Protocol):
    """W&B, TensorBoard, or another: it may fail and block as it likes, in a process of its own."""

    def log(self, run: TrackedRun, step: int, time: float, figures: Mapping[str, Any]) -> None:
        """Figures of a step; steps of a run only grow."""
        ...

    def conclude(self, run: TrackedRun, figures: Mapping[str, Any]) -> None:
        """Final figures, beside the history."""
        ...

    def alert(self, run: TrackedRun, title: str, text: str) -> None:
        """Something that a person should be told now."""
        ...

    def link(self, run: TrackedRun, artifact: Artifact) -> None:
        """What the run has made."""
        ...

    def flush(self) -> None:
        """Called now and then; OSError where what was given cannot be kept."""
        ...

    def close(self) -> None:
        """The last call, after a `flush`."""
        ...


class History:
    """Gives the lines of metrics.jsonl to a tracker, each to the runs that it is about."""

    def __init__(self, runs: Sequence[TrackedRun], tracker: Tracker) -> None:
        self._runs, self._tracker = runs, tracker
        self._prefixes = [run.prefix for run in runs if run.job_type == "train"]
        self._steps = dict.fromkeys((run.id for run in runs), -1)  # the last one that was logged

    def begin(self, entries: list[dict[str, Any]]) -> None:
        """What was there before: training by step, as it counts; alerts are over."""
        for entry in [*by_step(entries), *(entry for entry in entries if "phase" in entry)]:
            self._take(entry)

    def go_on(self, entries: Iterable[dict[str, Any]]) -> None:
        """What is said now."""
        for entry in entries:
            self._take(entry)
            self._alert(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        time = float(entry["time"])
        figures = {name: value for name, value in entry.items() if name not in ("time", "phase", "step")}
        match entry.get("phase"):
            case None:
                for run in self._of("train"):
                    own = of_dictionary(figures, run.prefix, [p for p in self._prefixes if p != run.prefix])
                    self._log(run, entry["step"], time, own)
            case "harvest":
                for run in self._of("harvest"):
                    self._log(run, self._steps[run.id] + 1, time, figures)
            case "evaluate":
                prefix = figures.pop("prefix", "")
                for run in self._of("evaluate", prefix):
                    self._log(run, self._steps[run.id] + 1, time, figures)
                for run in self._of("train", prefix):
                    self._tracker.conclude(run, {f"eval/{name}": value for name, value in figures.items()})
            case "artifact":
                for run in self._of("train", figures["prefix"]):
                    self._tracker.link(run, Artifact(figures["kind"], figures["uri"], figures["digest"]))

    def _log(self, run: TrackedRun, step: int, time: float, figures: Mapping[str, Any]) -> None:
        if step > self._steps[run.id]:  # a step that is done again comes to the same
            self._steps[run.id] = step
            self._tracker.log(run, step, time, figures)

    def _alert(self, entry: Mapping[str, Any]) -> None:
        """Sends what a key `alert`, or one that ends in /alert, says."""
        job_type = "harvest" if entry.get("phase") == "harvest" else "train"
        first = next(iter([*self._of(job_type, ""), *self._runs]), None)
        for name, text in entry.items():
            prefix, _, figure = name.rpartition("/")
            if figure == "alert" and first is not None:
                own = [run for run in self._of(job_type) if prefix and run.prefix == f"{prefix}/"]
                run = (own or [first])[0]
                self._tracker.alert(
                    run, f"{run.name}: step {entry['step']}" if "step" in entry else run.name, str(text)
                )

    def _of(self, job_type: JobType, prefix: str | None = None) -> list[TrackedRun]:
        return [run for run in self._runs if run.job_type == job_type and prefix in (None, run.prefix)]
