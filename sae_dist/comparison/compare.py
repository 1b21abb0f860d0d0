"""The comparison itself: two passes over the rows, and sums over pairs of latents between them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sae_dist.comparison import coactivation, tables, virtual_weights
from sae_dist.comparison.activations import Activations, Writer
from sae_dist.comparison.config import CompareConfig
from sae_dist.comparison.correlation import NONE
from sae_dist.comparison.figures import Figures, compared, distribution
from sae_dist.comparison.pairs import Given, Pair, has_neurons, pair_up
from sae_dist.comparison.rows import HeldoutRows
from sae_dist.config import to_dict
from sae_dist.progress import logged

FORMAT = 1
APART = "they do not rebuild the same rows of the same store"
ALL = "neurons rebuild every row as it is"
NO_STREAM = "none reads the residual stream of the same model further on than the other rebuilds it"


@dataclass(frozen=True)
class Comparison:
    """What was found; docs/compare.md says what each figure and column is."""

    figures: Figures  # compare.json
    matches: pa.Table  # a row a latent and pair; empty of one dictionary alone
    splits: pa.Table  # a row a latent of the smaller of each pair; empty of one dictionary alone
    inputs: pa.Table  # a row a latent of a dictionary that another feeds; empty where none does
    partners: pa.Table  # a row a latent of one dictionary alone


@torch.no_grad()
def compare(given: Sequence[Given], config: CompareConfig, scratch: Path) -> Comparison:
    """Compares each dictionary with each other; one alone with itself. `scratch` is an empty folder.

    UserError where their stores do not hold the same tokens in the same order.
    """
    rows = HeldoutRows([each.place for each in given], config.tokens)
    activations = _encode(given, rows, scratch)
    figures: Figures = {
        "format": FORMAT, "rows": activations[0].rows, "left_out": rows.left_out,
        "settings": {key: value for key, value in to_dict(config).items() if key != "shown"},
        "dictionaries": [_about(each, own) for each, own in zip(given, activations, strict=True)],
    }  # fmt: skip
    if len(given) == 1:
        found, partners = _alone(given[0], activations[0], config)
        figures["coactivation"] = found
        matches, splits, inputs = (of.empty_table() for of in (tables.MATCHES, tables.SPLITS, tables.INPUTS))
        return Comparison(figures, matches, splits, inputs, partners)
    every = range(len(given))
    pairs = [pair_up(a, b, given, activations, config) for a, b in itertools.combinations(every, 2)]
    if any(pair.stitch or pair.joined for pair in pairs):
        _read_again(pairs, given, activations, rows)
    fed = [_fed(pair, given, activations, config) for pair in pairs]
    figures["pairs"] = [
        _figures(pair, given, activations, config) | {"virtual_weights": own[0]}
        for pair, own in zip(pairs, fed, strict=True)
    ]
    matches = [
        _matches(pair, given, activations, stitched=own["stitching"] is not None)
        for pair, own in zip(pairs, figures["pairs"], strict=True)
    ]
    splits = [tables.of_splits(given[pair.smaller].name, given[pair.larger].name, pair.splits) for pair in pairs]
    return Comparison(
        figures, tables.together(matches, tables.MATCHES), tables.together(splits, tables.SPLITS),
        tables.together([own[1] for own in fed], tables.INPUTS), tables.PARTNERS.empty_table(),
    )  # fmt: skip


def _encode(given: Sequence[Given], rows: HeldoutRows, scratch: Path) -> list[Activations]:
    writers = [Writer(scratch / str(at), each.dictionary.n_latents) for at, each in enumerate(given)]
    for batch in logged(rows, "encoded", rows.batches, of="batches"):
        for each, x, writer in zip(given, batch.x, writers, strict=True):
            writer.add(each.dictionary.encode(x))
    return [writer.close() for writer in writers]


def _about(each: Given, own: Activations) -> Figures:
    info = each.dictionary.info
    return {
        "name": each.name, "where": each.where, "variant": info.get("variant"), "n_latents": own.n_latents,
        "k": each.dictionary.k, "hook": str(each.place.hooks), "model": info.get("model"),
        "store": each.place.store.storage.uri, "fire": int(own.fires.sum()), "never_fire": int((~own.fires).sum()),
        "l0": float(own.firings.sum() / own.rows) if own.rows else None,
    }  # fmt: skip


def _alone(each: Given, own: Activations, config: CompareConfig) -> tuple[Figures, pa.Table]:
    W_dec = each.dictionary.parameters.W_dec
    found = coactivation.partners(own, W_dec, kept=config.partners)
    chance = coactivation.by_chance(own, W_dec, seed=config.seed)
    jaccard = torch.where(found.latent[:, 0] >= 0, found.others[:, 0, 0], NONE)
    by_chance = torch.where(chance.latent[:, 0] >= 0, chance.others[:, 0, 0], NONE)
    figures = {
        name: {"found": distribution(best, own.firings), "chance": distribution(other, own.firings)}
        for name, best, other in (("correlation", found.best, chance.best), ("jaccard", jaccard, by_chance))
    }
    return figures, tables.of_partners(each.name, found, own.firings)


def _read_again(
    pairs: Sequence[Pair], given: Sequence[Given], activations: Sequence[Activations], rows: HeldoutRows
) -> None:
    """The second pass: reconstructions with latents of one dictionary in another, and what one feeds to another."""
    seen = 0
    stitched = sorted({at for pair in pairs if pair.stitch for at in (pair.smaller, pair.larger)})
    joined = sorted({at for pair in pairs if pair.joined for at in (pair.first, pair.second)})
    for batch in logged(rows, "rebuilt", rows.batches, of="batches"):
        active = {at: activations[at].of_rows(seen, seen + len(batch)) for at in {*stitched, *joined}}
        rebuilt = {at: given[at].dictionary.decode(active[at], batch.x[at]) for at in stitched}
        seen += len(batch)
        for pair in pairs:
            if pair.stitch is not None:
                both = pair.smaller, pair.larger
                target = batch.target[pair.smaller]
                pair.stitch.add(target, _two(active, both), _two(rebuilt, both))
            if pair.joined is not None:
                earlier, later, stream = pair.joined
                stream.add(batch.x[later], batch.target[earlier], _two(active, (earlier, later)))


def _fed(
    pair: Pair, given: Sequence[Given], activations: Sequence[Activations], config: CompareConfig
) -> tuple[Figures | None, pa.Table]:
    if pair.joined is None:
        return None, tables.INPUTS.empty_table()
    earlier, later, stream = pair.joined
    names, own = (given[earlier].name, given[later].name), (activations[earlier], activations[later])
    return virtual_weights.measure(stream, names, own, kept=config.inputs, seed=config.seed)


def _two(of: dict[int, Any], both: tuple[int, int]) -> tuple[Any, Any]:
    return of[both[0]], of[both[1]]


def _figures(pair: Pair, given: Sequence[Given], activations: Sequence[Activations], config: CompareConfig) -> Figures:
    names = [given[at].name for at in (pair.first, pair.second)]
    firings = [activations[at].firings for at in (pair.first, pair.second)]
    each = zip(names, names[::-1], pair.found, pair.chance, firings, pair.found[::-1], strict=True)
    matches = [
        {"of": name, "in": within}
        | {key: compared(own[key], chance[key], count, other=other[key], level=config.level) for key in own}
        for name, within, own, chance, count, other in each
    ]
    neurons = has_neurons(given[pair.first], given[pair.second])
    stitching = pair.stitch.figures() if pair.stitch is not None else ALL if neurons else APART
    why = {"stitching": stitching} if isinstance(stitching, str) else {}
    if "cosine" not in pair.found.first:
        why["cosine"] = "they rebuild different activations, so that their decoder rows have other coordinates"
    if pair.joined is None and not neurons and given[pair.first].place.hooks != given[pair.second].place.hooks:
        why["virtual_weights"] = NO_STREAM
    novel = int((activations[pair.larger].fires & (pair.splits.parent < 0)).sum())
    return {
        "smaller": given[pair.smaller].name, "larger": given[pair.larger].name,
        "match": pair.measure, "level": config.level,
        "matches": matches,
        "splitting": {**pair.splits.counts(), "novel": novel},
        "stitching": None if isinstance(stitching, str) else stitching,
        "not_measured": why,
    }  # fmt: skip


def _matches(pair: Pair, given: Sequence[Given], activations: Sequence[Activations], *, stitched: bool) -> pa.Table:
    names = given[pair.first].name, given[pair.second].name
    firings = activations[pair.first].firings, activations[pair.second].firings
    alone = pair.stitch.alone() if pair.stitch is not None and stitched else None
    return tables.of_matches(
        names, pair.found, firings, larger=int(pair.larger == pair.second), splits=pair.splits, alone=alone
    )
