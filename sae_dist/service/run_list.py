"""The runs under a folder, or under a prefix on object storage."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_dist import storage
from sae_dist.service.run_status import FILES, RunStatus, read_run
from sae_dist.storage import Storage


def read_runs(place: Storage, *, retry_s: float) -> list[RunStatus]:
    """Every run right under the place, the newest first."""
    names = folders_with(place, FILES)
    found = (read_run(storage.open(f"{place.uri}/{name}", retry_s=retry_s)) for name in names)
    return sorted((run for run in found if run is not None), key=_newest, reverse=True)


def folders_with(place: Storage, names: Sequence[str]) -> Iterator[str]:
    """The folders at a place that hold one of these files; of a disk no deeper folder is looked into."""
    if (probe := place.local_path(names[0])) is None:
        keys = (entry.key.split("/") for entry in place.list(""))
        yield from sorted({parts[0] for parts in keys if len(parts) == 2 and parts[1] in names})
        return
    folder = probe.parent
    for entry in sorted(os.scandir(folder), key=lambda each: each.name) if folder.is_dir() else ():
        if entry.is_dir() and any((Path(entry.path) / name).exists() for name in names):
            yield entry.name


def _newest(run: RunStatus) -> float:
    lines = [*run.training[-1:], *run.harvest[-1:]]
    return max([run.said.get("time", 0.0), *(line.get("time", 0.0) for line in lines)])
