"""Immutable snapshots of the commits: a run pins one and is told when the store no longer is what it saw."""

import re
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.shards import format
from sae_dist.shards.format import Commit, CorruptData
from sae_dist.storage import Storage


class Entry(NamedTuple):
    """One unit as a manifest pins it."""

    rows: int
    digest: str  # of the commit record


class Manifest(NamedTuple):
    """manifest/v<version>.json; `digest` is the hash of its content."""

    version: int
    digest: str
    commits: dict[int, Entry]


def manifest_key(version: int) -> str:
    return f"manifest/v{version:06d}.json"


def latest(storage: Storage) -> int:
    """The newest version, 0 when there is none."""
    found = (re.fullmatch(r"manifest/v(\d{6,})\.json", entry.key) for entry in storage.list("manifest/"))
    return max((int(match[1]) for match in found if match), default=0)


def read(storage: Storage, store: str, version: int) -> Manifest:
    """Manifest `version` of the store with digest `store`; anything else in its place is refused."""
    place = f"{storage.uri}/{manifest_key(version)}"
    try:
        record = format.read_record(storage, manifest_key(version), place)
    except FileNotFoundError:
        raise UserError(f"{place} does not exist; the newest manifest there is v{latest(storage)}") from None
    if record["store"] != store or record["version"] != version:
        raise CorruptData(f"{place} is v{record['version']} of store {record['store']}, not v{version} of {store}")
    commits = {int(unit): Entry(*entry) for unit, entry in record["commits"].items()}
    return Manifest(version, record["digest"], commits)


def write(storage: Storage, store: str, commits: dict[int, Commit]) -> Manifest:
    """The manifest of `commits`: the newest one if it says the same, else the next version."""
    entries = {unit: Entry(commit.rows, commit.digest) for unit, commit in sorted(commits.items())}
    version = latest(storage)
    if version:
        newest = read(storage, store, version)
        if newest.commits == entries:
            return newest
    while True:  # another process may take the same version: the next one is as good
        version += 1
        record = {"store": store, "version": version, "commits": {str(unit): list(e) for unit, e in entries.items()}}
        data = format.seal(record)
        if storage.create(manifest_key(version), data):
            return Manifest(version, format.unseal(data, "manifest")["digest"], entries)


def check(pinned: Manifest, commits: dict[int, Commit], *, place: str) -> None:
    """Refuses a store whose commits are not those of `pinned`; commits that came later are welcome."""
    missing = [unit for unit in pinned.commits if unit not in commits]
    changed = [unit for unit, e in pinned.commits.items() if unit in commits and commits[unit].digest != e.digest]
    if missing or changed:
        raise UserError(
            f"store={place} is not the one of manifest v{pinned.version} ({pinned.digest[:12]}): "
            f"{len(missing)} units missing{_some(missing)}, {len(changed)} with another commit{_some(changed)}; "
            "use the store that the run started on, or start a new run"
        )


def _some(units: list[int]) -> str:
    shown = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
    return f" ({shown})" if units else ""
