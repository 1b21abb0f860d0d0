"""A comparison of dictionaries, wherever they lie, in one process."""

import os
import re
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sae_dist import storage
from sae_dist.comparison.compare import Comparison, Given, compare
from sae_dist.comparison.config import CompareConfig
from sae_dist.comparison.files import write
from sae_dist.comparison.neurons import neurons
from sae_dist.comparison.rows import Place
from sae_dist.config import UserError
from sae_dist.sae import find
from sae_dist.sae.dictionary import Dictionary
from sae_dist.service.summary import read_summary
from sae_dist.shards import stores as store_files
from sae_dist.shards.hooks import Hooks, check, said_by, width
from sae_dist.shards.reader import Store

NAMES = string.ascii_uppercase  # of dictionaries, in the order given


class NeuronsOf(NamedTuple):
    """Stands for the neurons of a hook point, before a store says how many they are."""

    hook: str | None  # None: what the first dictionary reads


Named = tuple[str, Dictionary | NeuronsOf]


def found_at(where: str) -> Named:
    """The dictionary at `where`, or `neurons`, or `neurons:HOOK`. UserError where there is none, or it is damaged."""
    if (neurons_of := re.fullmatch(r"neurons(?::(.+))?", where)) is not None:
        return where, NeuronsOf(neurons_of[1])
    return where, find.load(where)


def compare_dictionaries(named: Sequence[Named], config: CompareConfig, *, out: Path | None = None) -> Comparison:
    """Compares dictionaries, each with where it lies; writes the page and its data into `out`, if there is one.

    UserError where there are none or too many, where their rows are not known, or are not of the same tokens.
    """
    if not 1 <= len(named) <= len(NAMES):
        raise UserError(f"{len(named)} dictionaries are given; give 1 to {len(NAMES)}")
    if out is not None and out.exists() and not out.is_dir():  # before the work
        raise UserError(f"out={out} is not a folder; choose another place")
    given = _given(named, config)
    with tempfile.TemporaryDirectory(prefix="sae_dist_compare_") as scratch:
        found = compare(given, config, Path(scratch))
    if out is not None:
        links = {
            own.name: os.path.relpath(pages, out)
            for own, (where, each) in zip(given, named, strict=True)
            if isinstance(each, Dictionary) and (pages := _pages(where)) is not None
        }
        write(out, found, links=links, shown=config.shown)
    return found


def _given(named: Sequence[Named], config: CompareConfig) -> list[Given]:
    uris = [config.store or (_store(where) if isinstance(each, Dictionary) else None) for where, each in named]
    known = next((uri for uri in uris if uri is not None), None)
    if known is None:
        raise UserError(
            f"{named[0][0]} does not lie in a run's folder, so that the store of its rows is not known; give store=..."
        )
    stores: dict[str, Store] = {}
    given = []
    for name, (where, each), uri in zip(NAMES, named, uris, strict=False):
        place = uri or known
        if place not in stores:
            stores[place] = _open(place, where)
        meta, message = stores[place].meta, f"store={place}, which {where} is to read"
        if isinstance(each, NeuronsOf):
            hook = each.hook or _first_read(named, where)
            check(Hooks((hook,)), meta, message)
            where, each = f"neurons of {hook}", neurons(hook, meta)
        hooks = said_by(each.info)
        check(hooks, meta, message)
        for side, names in zip((each.sizes.d_in, each.sizes.d_out), (hooks.sides * 2)[:2], strict=True):
            if (has := width(meta, names)) != side:
                raise UserError(f"store={place} has {has} dimensions at {'+'.join(names)}, {where} has {side}")
        given.append(Given(name, where, each, Place(stores[place], hooks)))
    return given


def _first_read(named: Sequence[Named], where: str) -> str:
    """The hook point that the first dictionary reads."""
    reads = next((said_by(each.info).reads for _, each in named if isinstance(each, Dictionary)), ())
    if len(reads) != 1:
        raise UserError(f"{where} does not say of which hook point; write neurons:HOOK, as neurons:mlp_act.3")
    return reads[0]


def _open(place: str, where: str) -> Store:
    there = storage.open(place)
    if not there.exists("store.json"):
        raise UserError(f"store={place}, whose rows {where} is to read, is not there; give store=... as it is now")
    return store_files.open(there)


def _run(where: str) -> Path | None:
    """The folder of the run whose dictionary lies at `where`; None where it is no run's."""
    if not where or find.is_uri(where):
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
