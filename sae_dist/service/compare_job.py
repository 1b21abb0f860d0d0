"""A comparison of dictionaries, wherever they lie, in one process."""

import os
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sae_dist import storage
from sae_dist.comparison.compare import Comparison, Given, compare
from sae_dist.comparison.config import CompareConfig
from sae_dist.comparison.files import write
from sae_dist.comparison.rows import Place
from sae_dist.config import UserError
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.find import is_uri
from sae_dist.service.summary import read_summary
from sae_dist.shards import stores as store_files
from sae_dist.shards.hooks import check, said_by, width
from sae_dist.shards.reader import Store

NAMES = string.ascii_uppercase  # of dictionaries, in the order given


def compare_dictionaries(
    named: Sequence[tuple[str, Dictionary]], config: CompareConfig, *, out: Path | None = None
) -> Comparison:
    """Compares dictionaries, each with where it lies; writes the page and its data into `out`, if there is one.

    UserError where there are none or too many, where their rows are not known, or are not of the same tokens.
    """
    if not 1 <= len(named) <= len(NAMES):
        raise UserError(f"{len(named)} dictionaries are given; give 1 to {len(NAMES)}")
    if out is not None and out.exists() and not out.is_dir():  # before the work
        raise UserError(f"out={out} is not a folder; choose another place")
    places = _places(named, config)
    given = [Given(name, *each, place) for name, each, place in zip(NAMES, named, places, strict=False)]
    with tempfile.TemporaryDirectory(prefix="sae_dist_compare_") as scratch:
        found = compare(given, config, Path(scratch))
    if out is not None:
        links = {each.name: os.path.relpath(pages, out) for each in given if (pages := _pages(each.where)) is not None}
        write(out, found, links=links, shown=config.shown)
    return found


def _places(named: Sequence[tuple[str, Dictionary]], config: CompareConfig) -> list[Place]:
    uris = [config.store or _store(where) for where, _ in named]
    known = next((uri for uri in uris if uri is not None), None)
    if known is None:
        raise UserError(
            f"{named[0][0]} does not lie in a run's folder, so that the store of its rows is not known; give store=..."
        )
    stores: dict[str, Store] = {}
    found = []
    for (where, dictionary), uri in zip(named, uris, strict=True):
        place = uri or known
        if place not in stores:
            stores[place] = _open(place, where)
        hooks, meta = said_by(dictionary.info), stores[place].meta
        check(hooks, meta, f"store={place}, which {where} is to read")
        for side, names in zip((dictionary.sizes.d_in, dictionary.sizes.d_out), (hooks.sides * 2)[:2], strict=True):
            if (has := width(meta, names)) != side:
                raise UserError(f"store={place} has {has} dimensions at {'+'.join(names)}, {where} has {side}")
        found.append(Place(stores[place], hooks))
    return found


def _open(place: str, where: str) -> Store:
    there = storage.open(place)
    if not there.exists("store.json"):
        raise UserError(f"store={place}, whose rows {where} is to read, is not there; give store=... as it is now")
    return store_files.open(there)


def _run(where: str) -> Path | None:
    """The folder of the run whose dictionary lies at `where`; None where it is no run's."""
    if not where or is_uri(where):
        return None
    path = Path(where).expanduser().absolute()
    folders = [path, *([path.parent] if path.name == "dictionary" else [])]
    folders += [path.parent.parent] if path.parent.name == "dictionaries" else []
    return next((folder for folder in folders if (folder / "summary.json").is_file()), None)


def _store(where: str) -> str | None:
    run = _run(where)
    return None if run is None else read_summary(run)["store"]


def _pages(where: str) -> Path | None:
    """The feature pages of the dictionary at `where`: those of a run are of its main one."""
    run = _run(where)
    main = run is not None and Path(where).expanduser().absolute() in (run, run / "dictionary")
    return run / "pages" if run is not None and main and (run / "pages" / "index.html").is_file() else None
