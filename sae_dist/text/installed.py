"""Files of installed distributions and of Python's own library, in a fixed order by the hash of their names."""

import csv
import functools
import importlib.metadata
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

PYTHON = "python"  # stands for Python's own library where a distribution is expected


class Installed(NamedTuple):
    name: str  # relative to the installation, so that it is the same on every machine
    path: Path

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")


def hash_ordered(items: Iterable[Installed]) -> list[Installed]:
    """Sorted by the hash of the name, so that any beginning is a fair sample."""
    return sorted(items, key=lambda item: (xxhash.xxh3_64_intdigest(item.name.encode()), item.name))


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """The version of each of `distributions` that is installed."""
    found = {}
    for distribution in distributions:
        if (known := _distribution(distribution)) is not None:
            found[distribution] = known.version
    return found


def files(distributions: Sequence[str], suffixes: tuple[str, ...]) -> Iterator[Installed]:
    """The files of `distributions` whose names end in `suffixes`, in hash order; those not installed have none."""
    found: list[Installed] = []
    for distribution in distributions:
        if distribution == PYTHON:
            found += _python_files(suffixes)
        elif (known := _distribution(distribution)) is not None:
            found += [
                Installed(name, Path(str(known.locate_file(name))))
                for name in _recorded(distribution)
                if name.endswith(suffixes) and not name.startswith("..")
            ]
    for item in hash_ordered(found):
        if item.path.is_file():
            yield item


@functools.cache
def _recorded(distribution: str) -> list[str]:
    """The names of a distribution's files, which many readers ask for."""
    return [row[0] for row in csv.reader(metadata(distribution, "RECORD").splitlines()) if row]


def metadata(distribution: str, name: str) -> str:
    """The text of `name` (METADATA, RECORD) of an installed distribution; empty where it has none."""
    known = _distribution(distribution)
    return (known.read_text(name) or "") if known is not None else ""


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python_files(suffixes: tuple[str, ...]) -> Iterator[Installed]:
    for root in {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))}:
        for folder, below, names in os.walk(root):
            # tests are missing from many distributions of Python; the other folders are not part of it
            below[:] = [
                name
                for name in below
                if name not in {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
                and not name.startswith("config-")
            ]
            for name in names:
                if name.endswith(suffixes):
                    path = Path(folder, name)
                    yield Installed(f"{PYTHON}/{path.relative_to(root).as_posix()}", path)
