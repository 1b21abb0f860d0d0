"""Held-out rows of a store once: latents, or neurons, against proxies and categories of the text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.comparison.correlation import NONE
from sae_dist.sae.dictionary import Dictionary
from sae_dist.shards.reader import Store, heldout
from sae_dist.text.stream import TokenStream

BATCH_ROWS = 8192  # a unit of a harvest: rows are stored in an order by chance within it


class Rows(NamedTuple):
    """Held-out rows of a unit in the order of the text, and where each stands in it."""

    x: Float[Tensor, "rows width"]
    at: Int[np.ndarray, " rows"]  # place in the token stream
    half: int  # 0 or 1, by units


class Rowed(NamedTuple):
    """A store of one hook point, and the held-out text of its rows."""

    store: Store
    stream: TokenStream
    hook: str


class Found(NamedTuple):
    """Of every latent over all rows."""

    rows: int
    firings: Int[Tensor, " n"]
    mass: Float[Tensor, "n categories"]  # sum of activations in documents of each category
    chosen_by: Float[Tensor, "n proxies"]  # Pearson's r with each proxy on every other unit of rows, ...
    r: Float[Tensor, "n proxies"]  # and on the others: what a latent was chosen by does not judge it

    def best(self, proxy: int) -> tuple[int, float]:
        """The latent that is chosen for a proxy, and its r on other rows."""
        latent = int(self.chosen_by[:, proxy].argmax())
        return latent, float(self.r[latent, proxy])


class Text(NamedTuple):
    """What is known of each place in the token stream."""

    proxies: Float[np.ndarray, "places proxies"]
    category: Int[np.ndarray, " places"]
    n_categories: int


class Sums:
    """Sums over rows of some units (latents or neurons) against proxies, fp64."""

    def __init__(self, n: int, text: Text) -> None:
        self._text, self._rows = text, 0
        width = text.proxies.shape[1]
        self._firings = torch.zeros(n, dtype=torch.int64)
        self._mass = torch.zeros(n, text.n_categories, dtype=torch.float64)
        self._halves = [Products(n, width), Products(n, width)]

    def add(self, rows: Rows, unit: Tensor, row: Tensor, value: Tensor) -> None:
        """Activations `value` of `unit` at places `row` of these rows."""
        category = torch.from_numpy(self._text.category[rows.at])
        value = value.double()
        self._rows += len(rows.at)
        self._firings += unit.bincount(minlength=len(self._firings))
        self._mass.view(-1).index_add_(0, unit * self._text.n_categories + category[row], value)
        self._halves[rows.half].add(torch.from_numpy(self._text.proxies[rows.at]), unit, row, value)

    def found(self) -> Found:
        one, other = (half.r() for half in self._halves)
        return Found(self._rows, self._firings, self._mass, one, other)


class Products:
    """What Pearson's r of units with proxies takes."""

    def __init__(self, n: int, width: int) -> None:
        self._n = 0
        self._f, self._ff = torch.zeros(2, n, dtype=torch.float64)
        self._p, self._pp = torch.zeros(2, width, dtype=torch.float64)
        self._fp = torch.zeros(n, width, dtype=torch.float64)

    def add(self, proxies: Tensor, unit: Tensor, row: Tensor, value: Tensor) -> None:
        self._n += len(proxies)
        self._f.index_add_(0, unit, value)
        self._ff.index_add_(0, unit, value.square())
        self._p += proxies.sum(0)
        self._pp += proxies.square().sum(0)
        self._fp.index_add_(0, unit, value[:, None] * proxies[row])

    def r(self) -> Float[Tensor, "n proxies"]:
        n = max(self._n, 1)
        f, p = self._f / n, self._p / n
        varies = (self._ff / n - f.square()).clamp(min=0).sqrt()[:, None]
        scale = varies * (self._pp / n - p.square()).clamp(min=0).sqrt()
        return torch.where(scale > 0, (self._fp / n - f[:, None] * p) / scale, NONE)


def heldout_rows(rowed: Rowed) -> Iterator[Rows]:
    store, stream, hook = rowed
    for part in heldout(store, hook, BATCH_ROWS):
        at = stream.places(part.doc, part.pos)
        read = np.argsort(at)
        yield Rows(part.x[read].float(), at[read], part.unit % 2)


@torch.no_grad()
def measure(dictionaries: Mapping[str, Dictionary], rowed: Rowed, text: Text) -> tuple[Found, dict[str, Found]]:
    """The neurons, and each dictionary."""
    width = next(iter(dictionaries.values())).sizes.d_in
    neurons, latents = Sums(width, text), {name: Sums(own.n_latents, text) for name, own in dictionaries.items()}
    for rows in heldout_rows(rowed):
        row, neuron = rows.x.nonzero(as_tuple=True)
        neurons.add(rows, neuron, row, rows.x[row, neuron])
        for name, dictionary in dictionaries.items():
            active = dictionary.encode(rows.x)
            latents[name].add(rows, active.indices, active.rows, active.values)
    return neurons.found(), {name: own.found() for name, own in latents.items()}


@torch.no_grad()
def neurons_alike(one: Rowed, other: Rowed) -> Float[Tensor, " n"]:
    """Of each neuron of `one`, the largest r with one of `other` on the same tokens; NONE where it never varies."""
    x, y = (torch.cat([rows.x for rows in heldout_rows(rowed)]).double() for rowed in (one, other))
    x, y = (each - each.mean(0) for each in (x, y))
    scale = x.norm(dim=0)[:, None] * y.norm(dim=0)
    return torch.where(scale > 0, x.t() @ y / scale, NONE).amax(1)


@torch.no_grad()
def transitions(
    dictionary: Dictionary, latents: Sequence[int], rowed: Rowed
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """P(latent j is active on the next token | i is active), over neighbours in the text, and P(j is active)."""
    chosen = torch.full((dictionary.n_latents,), -1)
    chosen[list(latents)] = torch.arange(len(latents))
    both, own, rows = torch.zeros(len(latents), len(latents)), torch.zeros(len(latents)), 0
    for part in heldout_rows(rowed):
        active = dictionary.encode(part.x)
        fires = torch.zeros(len(part.x), len(latents))
        kept = chosen[active.indices] >= 0
        fires[active.rows[kept], chosen[active.indices[kept]]] = 1
        follows = torch.from_numpy(np.diff(part.at) == 1)
        both += fires[:-1][follows].t() @ fires[1:][follows]
        own += fires[:-1][follows].sum(0)
        rows += int(follows.sum())
    return both / own.clamp(min=1)[:, None], own / max(rows, 1)
