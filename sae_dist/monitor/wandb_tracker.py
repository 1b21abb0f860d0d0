"""Weights & Biases: one run a dictionary, with its panels over tokens. Imported in a process of its own alone."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.paths import LogicalPath

from sae_dist.monitor.config import Mode
from sae_dist.monitor.panels import EDGES, HISTOGRAM
from sae_dist.monitor.tracked import Artifact, TrackedRun

INIT_S = 60.0  # for the server to answer
ROOM = 1 << 16  # bytes: more than the lines of a second
TITLE = 64  # characters that W&B allows


class WandbTracker:
    """A Tracker. Runs are begun when there is something to say of them, and online go on where they were."""

    def __init__(self, *, folder: str, mode: Mode, project: str, entity: str | None) -> None:
        self._folder, self._project, self._entity = folder, project, entity
        self._mode: Mode = mode
        self._runs: dict[str, wandb.Run] = {}
        self._known: dict[str, int] = {}  # the first step that the server does not have

    def log(self, run: TrackedRun, step: int, time: float, figures: Mapping[str, Any]) -> None:
        there = self._begun(run)
        if step < self._known[run.id]:
            return
        shown = {name: value for name, value in figures.items() if value is not None}
        if HISTOGRAM in shown:
            shown[HISTOGRAM] = wandb.Histogram(np_histogram=(np.array(shown[HISTOGRAM]), np.array(EDGES)))
        there.log(shown | {"_timestamp": time}, step=step)

    def conclude(self, run: TrackedRun, figures: Mapping[str, Any]) -> None:
        self._begun(run).summary.update({name: value for name, value in figures.items() if value is not None})

    def alert(self, run: TrackedRun, title: str, text: str) -> None:
        """Mail or Slack, as the user has set it there."""
        self._begun(run).alert(title=title[:TITLE], text=text, level="WARN")

    def link(self, run: TrackedRun, artifact: Artifact) -> None:
        """By address and digest. `add_reference` would read the file to hash it, or need a client for its storage."""
        made = wandb.Artifact(f"{run.id}-{artifact.kind}", artifact.kind, metadata={"digest": artifact.digest})
        name = artifact.uri.rpartition("/")[2]
        entry = ArtifactManifestEntry(path=LogicalPath(name), ref=artifact.uri, digest=artifact.digest)
        made.manifest.add_entry(entry)
        self._begun(run).log_artifact(made)

    def show(self, run: TrackedRun, media: Mapping[str, Any]) -> None:
        """Tables and plots, in place of those that it showed before."""
        self._begun(run).log(dict(media))

    def flush(self) -> None:
        """Sees whether there is room: wandb-core says nothing of what it could not write."""
        if self._runs:
            with tempfile.TemporaryFile(dir=Path(self._folder) / "wandb") as file:
                file.write(bytes(ROOM))

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()

    def _begun(self, run: TrackedRun) -> "wandb.Run":
        if run.id not in self._runs:
            begun = wandb.init(
                id=run.id, name=run.name, group=run.group, job_type=run.job_type, config=run.config, dir=self._folder,
                mode=self._mode, project=self._project, entity=self._entity,
                resume="allow" if self._mode == "online" else None,
                settings=wandb.Settings(
                    init_timeout=INIT_S, silent=True, console="off", reinit="create_new",
                    x_disable_stats=bool(self._runs),  # the machine's are the same for all
                ),
            )  # fmt: skip
            if run.job_type != "sweep":
                begun.define_metric("*", step_metric="tokens_trained" if run.job_type == "evaluate" else "tokens")
            self._runs[run.id], self._known[run.id] = begun, begun.step
        return self._runs[run.id]
