"""The points of a sweep's command line: their ids, the folders and stores they get, and which may train together."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sae_dist import storage
from sae_dist.config import UserError, digest, to_dict
from sae_dist.sae.config import check_width
from sae_dist.service.config import RunConfig, TrainJob, identity
from sae_dist.service.rank_session import chosen_hooks
from sae_dist.service.sweep_room import Sizes, sizes
from sae_dist.shards import stores
from sae_dist.shards.hooks import width
from sae_dist.sweep import group
from sae_dist.sweep.folder import SweepFolder
from sae_dist.sweep.halving import HalvingConfig

HARVEST = ("model", "text", "harvest", "hook")  # what a store that the sweep fills itself depends on


class Planned(NamedTuple):
    """A point that the command asks for."""

    id: str
    overrides: Mapping[str, Any]  # the swept keys with its values
    config: TrainJob | RunConfig  # with the folder that the point gets
    values: dict[str, Any]  # the same as plain values
    shared: str  # equal for points that may train in one pass
    sizes: Sizes
    store: str | None  # of a store that the sweep fills itself; None: one that is given


def planned(
    command: str, asked: Iterable[tuple[Mapping[str, Any], TrainJob | RunConfig]], folder: SweepFolder
) -> list[Planned]:
    """Each of these configurations, with its overrides, as a point; one that is asked for twice is one.

    UserError for a point that cannot be trained, and for two that only keys tell apart which do not change what comes
    out.
    """
    found: dict[str, Planned] = {}
    known: dict[tuple[str, tuple[str, ...]], Sizes] = {}
    for overrides, config in asked:
        said = " ".join(f"{key}={value}" for key, value in overrides.items()) or "the only point"
        try:
            point = _point(command, overrides, config, folder, known)
        except storage.Unavailable:
            raise
        except UserError as error:
            raise UserError(f"{said}: {error}") from None
        if point.id in found and (twin := found[point.id].overrides) != overrides:
            differing = next(key for key, value in overrides.items() if twin.get(key) != value)
            raise UserError(
                f"{differing}={twin.get(differing)} and {differing}={overrides[differing]} come to the same "
                f"dictionary: this key only says where or how fast a run works; give {differing} one value"
            )
        found[point.id] = point
    return list(found.values())


def rungs(point: Planned, halving: HalvingConfig, folder: SweepFolder) -> list[Planned]:
    """The shorter trainings of a point after which it is compared with others, the shortest first."""
    found = []
    for steps in halving.steps(point.config.train.n_steps):
        train = dataclasses.replace(point.config.train, steps=steps, tokens=None)
        config = dataclasses.replace(point.config, train=train, out=str(folder.rung(point.id, steps)))
        values = to_dict(config)
        found.append(
            point._replace(id=f"{point.id}-{steps}", config=config, values=values, shared=group.shared_by(values))
        )
    return found


def _point(
    command: str, overrides: Mapping[str, Any], config: TrainJob | RunConfig, folder: SweepFolder,
    known: dict[tuple[str, tuple[str, ...]], Sizes],
) -> Planned:  # fmt: skip
    if config.more_dictionaries:
        raise UserError(
            "more_dictionaries= is what a sweep makes of its points; leave it out, and give keys several values"
        )
    if config.mirror is not None:
        raise UserError(f"mirror={config.mirror} is the copy of one run; leave it out, or copy the sweep's folder")
    store_digest, own_store = None, None
    if isinstance(config, TrainJob):
        place = config.with_absolute_paths().store
        store = stores.open(storage.open(place))
        store_digest, sides = store.meta.digest, chosen_hooks(store, config).sides
        hooks = max(sides, key=lambda side: width(store.meta, side))  # the wider side decides what it needs
    else:
        hooks = config.hooks
        if config.harvest.retention != "keep":
            raise UserError(
                f"harvest.retention={config.harvest.retention} deletes rows that other points still need; use keep"
            )
        if config.store is None:
            made_from = {key: value for key, value in identity(to_dict(config)).items() if key.split(".")[0] in HARVEST}
            own_store = digest(made_from)[:8]
            config = dataclasses.replace(config, store=str(folder.store(own_store)))
        place = config.store_uri
    values = identity(to_dict(config))
    point = digest([command, values, store_digest])[:12]
    config = dataclasses.replace(config, out=str(folder.point(point))).with_absolute_paths()
    if (place, hooks) not in known:
        known[place, hooks] = sizes(config, hooks, place)
    check_width(config.sae, known[place, hooks].d_model)
    values = to_dict(config)
    return Planned(point, overrides, config, values, group.shared_by(values), known[place, hooks], own_store)
