"""Immutable snapshots of the commits. A run pins one, and is refused when the store no longer matches it."""

import re
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.shards import format, records
from sae_dist.shards.commits import Commit
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.records import CorruptData, Count
from sae_dist.storage import Storage


class PinnedUnit(NamedTuple):
    """One unit as a manifest pins it."""

    rows: Count
    digest: str  # of the commit record


class Manifest(NamedTuple):
    """manifest/v<version>.json; `digest` is the hash of its content."""

    store: str  # digest of store.json
    version: Count
    digest: str
    commits: dict[Count, PinnedUnit]


def manifest_key(version: int) -> str:
    return f"manifest/v{version:06d}.json"


def latest(storage: Storage) -> int:
    """The newest version, 0 when there is none."""
    found = (re.fullmatch(r"manifest/v(\d{6,})\.json", entry.key) for entry in storage.list("manifest/"))
    return max((int(match[1]) for match in found if match), default=0)


def read(storage: Storage, meta: StoreMeta, version: int) -> Manifest:
    """Manifest `version` of that store; CorruptData when it is another one."""
    place = f"{storage.uri}/{manifest_key(version)}"
    try:
        record = records.read(storage, manifest_key(version), place, most=format.manifest_bytes(meta))
    except FileNotFoundError:
        raise UserError(f"{place} does not exist; the newest manifest there is v{latest(storage)}") from None
    found = records.checked(Manifest, record, place)
    if found.store != meta.digest or found.version != version:
        raise CorruptData(f"{place} is v{found.version} of store {found.store}, not v{version} of {meta.digest}")
    return found


def write(storage: Storage, meta: StoreMeta, commits: dict[int, Commit]) -> Manifest:
    """The manifest of `commits`: the newest one if it says the same, else the next version."""
    entries = {unit: PinnedUnit(commit.rows, commit.digest) for unit, commit in sorted(commits.items())}
    version = latest(storage)
    if version:
        newest = read(storage, meta, version)
        if newest.commits == entries:
            return newest
    while True:  # another process may take the same version; then the next one is tried
        version += 1
        named = {str(unit): list(entry) for unit, entry in entries.items()}
        data = records.seal({"store": meta.digest, "version": version, "commits": named})
        if storage.create(manifest_key(version), data):
            return Manifest(meta.digest, version, records.unseal(data, "manifest")["digest"], entries)


def check(pinned: Manifest, commits: dict[int, Commit], changed: list[int], *, place: str) -> None:
    """UserError when units of `pinned` are missing from `commits`, or when there are `changed` units."""
    missing = [unit for unit in pinned.commits if unit not in commits]
    if missing or changed:
        raise UserError(
            f"store={place} is not the one of manifest v{pinned.version} ({pinned.digest[:12]}): "
            f"{len(missing)} units missing{_some(missing)}, {len(changed)} with another commit{_some(changed)}; use "
            "the store that the run started on, or start a new run"
        )


def _some(units: list[int]) -> str:
    shown = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
    return f" ({shown})" if units else ""
