"""What the pages ask a server about a run's feature data (served/source.js), as JSON values.

Never more than some thousand latents in one answer, however many there are.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from sae_dist.config import UserError
from sae_dist.interpret.feature_index import Index, index_of, index_rows
from sae_dist.interpret.read_features import Features
from sae_dist.interpret.records import PROMOTED_TOKENS
from sae_dist.interpret.search import SORTS, Query, select
from sae_dist.interpret.served_records import brief, latent_record
from sae_dist.interpret.site import shown_token

BARS = 60  # of the histogram of densities
DOTS = 3000  # latents in the plot of density against strength, and as many of those that are chosen
LISTED = 100_000  # of the latents that match: a browser cannot make a longer list
AT_ONCE = 500  # rows of the list in one answer
ORDERS = 8  # that are kept: the list asks for its parts one after another


class FeatureAnswers:
    """For several threads."""

    def __init__(self, found: Features, name: str) -> None:
        """`name` is that of the run."""
        self.found, self._name, self._lock = found, name, threading.Lock()
        self._tokens, self._orders = found.tokens(), dict[Query, Int[np.ndarray, " n"]]()

    def facts(self) -> dict[str, Any]:
        """What all pages show or reckon with."""
        about = self.found.about
        return {
            "summary": {"name": self._name} | about["summary"],
            "rows": about["rows"],
            "n_latents": about["n_latents"],
            "categories": about["categories"],
            "category_rows": about["category_rows"],
            "no_outputs": about["no_outputs"],
            "token_bytes": 2,  # an answer has its own table of tokens
        }

    def overview(self) -> dict[str, Any]:
        """The plots of all latents that fired; densities and maxima as logarithms to the base of 10."""
        index = self.found.searched().of
        fired = (index.firings > 0).nonzero()[0]
        return {
            "fired": len(fired),
            "pages": len(index.firings),
            "density": self._spans[0],
            "maximum": self._spans[1],
            "bars": self._bars(fired),
            "dots": self._dots(fired),
        }

    def selection(self, query: Query) -> dict[str, Any]:
        """How many latents match, the first of them, and where they lie in the plots."""
        order = self._order(query)
        fired = order[self.found.searched().of.firings[order] > 0]
        return {
            "total": len(order),
            "listed": min(len(order), LISTED),
            "bars": self._bars(fired),
            "dots": self._dots(fired),
            "rows": self.rows(query, 0, 100),
        }

    def rows(self, query: Query, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows of the list from `start` to before `stop`."""
        if not 0 <= start <= stop <= min(start + AT_ONCE, LISTED):
            raise UserError(f"from={start} to={stop} are no rows of the list; ask for at most {AT_ONCE}")
        return self._rows(self._order(query)[start:stop].tolist())

    def walk(self, query: Query, latent: int) -> dict[str, int | None]:
        """The place of a latent in the list, and its neighbours there."""
        order = self._order(query)
        places = (order == latent).nonzero()[0].tolist()
        place = places[0] if places else -1
        near = {"previous": place - 1, "next": place + 1}
        others = {name: int(order[at]) if 0 <= at < len(order) else None for name, at in near.items()}
        return {"place": place, "total": len(order), **others}

    def row(self, latent: int) -> dict[str, Any]:
        """Its row of the list."""
        return self._rows([latent])[0]

    def latent(self, latent: int) -> dict[str, Any]:
        """Everything on the page of a latent, read from its own row group."""
        table = self.found.read([latent])
        record, tokens = latent_record(table.to_pylist()[0])
        labels = self.found.labels([latent])
        label = None if labels is None else labels[0].as_py()
        row = self._row(index_of(index_rows(table)), 0, latent, label)
        return {"row": row, "record": record, "tokens": self._shown(tokens)}

    def _order(self, query: Query) -> Int[np.ndarray, " n"]:
        with self._lock:
            if query not in self._orders:
                self._orders[query] = select(self.found.searched(), query)
                while len(self._orders) > ORDERS:
                    self._orders.pop(next(iter(self._orders)))
            return self._orders[query]

    def _rows(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        index, _, _, _, labels = self.found.searched()
        return [self._row(index, at, at, None if labels is None else labels[at].as_py()) for at in latents]

    def _row(self, index: Index, at: int, latent: int, label: str | None) -> dict[str, Any]:
        maximum, mean = brief([index.max[at], index.mean[at]])
        return {
            "latent": latent,
            "page": True,
            "label": label,
            "count": int(index.firings[at]),
            "maximum": maximum,
            "mean": mean,
            "category": int(index.category[at]),
            "purity": round(float(index.purity[at]), 3),
            "tokens": self._shown(index.fires_on.of(at)),
            "promoted": self._shown(index.promoted.of(at)[:PROMOTED_TOKENS]),
        }

    def _shown(self, tokens: Sequence[int]) -> list[str | list[str]]:
        """Tokens as the pages show them, by their ids; all of them are in the vocabulary."""
        places = np.searchsorted(self._tokens["token"].to_numpy(), np.asarray(tokens, np.int64))
        own = self._tokens.take(pa.array(places)).to_pylist()
        return [
            shown_token(one["bytes"] if one["text"] is None else one["text"], special=one["special"]) for one in own
        ]

    @cached_property
    def _logarithms(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Of the density and maximum of every latent; minus infinity where it never fired."""
        index, rows, *_ = self.found.searched()
        with np.errstate(divide="ignore"):
            return np.log10(index.firings / rows), np.log10(index.max.astype(np.float64))

    def _bars(self, latents: Int[np.ndarray, " n"]) -> list[int]:
        """Their histogram over the range of the densities of all latents."""
        return np.histogram(self._logarithms[0][latents], BARS, self._spans[0])[0].tolist()

    @cached_property
    def _spans(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ranges of the densities and maxima of all latents that fired."""
        density, maximum = (each[self.found.searched().of.firings > 0] for each in self._logarithms)
        return _span(density), _span(maximum)

    def _dots(self, latents: Int[np.ndarray, " n"]) -> dict[str, list[float]]:
        """A chance sample of them, the same one each time."""
        if len(latents) > DOTS:
            latents = np.sort(np.random.default_rng(0).choice(latents, DOTS, replace=False, shuffle=False))
        density, maximum = (each[latents] for each in self._logarithms)
        return {"latent": latents.tolist(), "density": density.round(4).tolist(), "maximum": maximum.round(4).tolist()}


def _span(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """A range with some room at both ends."""
    if not len(values):
        return -1.0, 0.0
    low, high = float(values.min()), float(values.max())
    room = max(0.04 * (high - low), 0.05)
    return low - room, high + room


def query_of(fields: Mapping[str, str]) -> Query:
    """The query that an address asks for (writeQuery in static/query.js); UserError for a field that is none."""
    sort, direction = fields.get("sort", "latent"), fields.get("dir")
    if sort not in SORTS:
        raise UserError(f"sort={sort} is not known; choose of {', '.join(SORTS)}")
    if direction not in (None, "asc", "desc"):
        raise UserError(f"dir={direction} is not known; choose of asc, desc")
    descending = sort != "latent" if direction is None else direction == "desc"
    return Query(
        fields.get("q", ""), sort, descending, fields.get("all") == "1", _range(fields, "d"), _range(fields, "m")
    )


def _range(fields: Mapping[str, str], name: str) -> tuple[float, float] | None:
    if name not in fields:
        return None
    try:
        low, high = map(float, fields[name].split(".."))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name}={fields[name]} is no range; give two numbers, LOW..HIGH")
    return low, high
