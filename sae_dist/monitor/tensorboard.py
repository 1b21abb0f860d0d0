"""Event files for TensorBoard: a folder a dictionary. Imported in a process of its own alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary  # pyright: ignore[reportAttributeAccessIssue]

from sae_dist.monitor.panels import EDGES
from sae_dist.monitor.tracked import Artifact, TrackedRun


class TensorboardTracker:
    """A Tracker. Every attempt writes the whole history anew, in place of what was there before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, EventsWriter] = {}

    def log(self, run: TrackedRun, step: int, time: float, figures: Mapping[str, Any]) -> None:
        values = [value for name, figure in figures.items() if (value := _value(name, figure)) is not None]
        self._write(run, Event(wall_time=time, step=step, summary=Summary(value=values)))

    def conclude(self, run: TrackedRun, figures: Mapping[str, Any]) -> None:
        """An evaluation has a folder of its own."""

    def alert(self, run: TrackedRun, title: str, text: str) -> None:
        """TensorBoard tells nobody."""

    def link(self, run: TrackedRun, artifact: Artifact) -> None:
        """TensorBoard has no artifacts."""

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, run: TrackedRun, event: Event) -> None:
        if run.id not in self._files:
            folder = self._folder / run.name
            folder.mkdir(parents=True, exist_ok=True)
            file = self._files[run.id] = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            # TensorBoard leaves out what other files of the folder say of steps from here on.
            file.write_event(Event(wall_time=event.wall_time, step=0, session_log=SessionLog(status=SessionLog.START)))
        self._files[run.id].write_event(event)


def _value(name: str, figure: object) -> Summary.Value | None:
    match figure:
        case bool() | str() | None:
            return None
        case int() | float():
            return Summary.Value(tag=name, simple_value=figure)
        case list():
            return Summary.Value(tag=name, histo=_histogram(figure))
    raise TypeError(f"{name} is {type(figure).__name__}, which is no figure")


def _histogram(counts: list[int]) -> HistogramProto:
    """Counts over EDGES; the sums are those of the bins' middles."""
    middles = [(low + high) / 2 for low, high in zip(EDGES, EDGES[1:], strict=False)]
    weighted = list(zip(counts, middles, strict=True))
    return HistogramProto(
        min=EDGES[0], max=EDGES[-1], num=sum(counts), sum=sum(n * x for n, x in weighted),
        sum_squares=sum(n * x * x for n, x in weighted), bucket_limit=[*EDGES], bucket=[0, *counts],
    )  # fmt: skip
