"""What is known of latents, as passages of text: a part that the labeller is shown, the rest to score its labels on."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sae_dist.config import UserError
from sae_dist.interpret.read_features import Features

POOL_LATENTS = 256  # whose contexts are what another latent does not fire on
TRIES = 30  # to draw a passage on which the latent is not known to fire
TOO_OFTEN = 0.1  # share of a category's tokens: where a latent fires on more, chance tokens would often be its own
COLUMNS = ("latent", "density", "category_firings", "promoted", "contexts")

Piece = str | bytes  # a token's text, or its bytes where they are no whole characters


class Passage(NamedTuple):
    """Tokens round the token at `at`, and where in them one latent is active."""

    pieces: tuple[Piece, ...]
    at: int
    active: tuple[int, ...]  # places in `pieces`
    value: float  # activation at `at`
    interval: int  # -1: one of the strongest; else a chance one of that part of the latent's range
    category: str | None
    doc: int
    pos: int  # of `at` in the document

    @property
    def peak(self) -> Piece:
        return self.pieces[self.at]


class Evidence(NamedTuple):
    """Of one latent. `shown` and `others` are for the labeller; it never sees the rest.

    others, held_others: passages of other latents, which end in a token on which this one is not known to fire
    """

    latent: int
    promoted: tuple[str, ...]  # output tokens
    shown: Sequence[Passage]
    others: Sequence[Passage]
    held: Sequence[Passage]
    held_others: Sequence[Passage]


Pooled = dict[str | None, list[Passage]]  # passages of latents chosen by chance, by category


class Source:
    """Reads evidence from feature data; the same features and seed give the same evidence."""

    def __init__(self, features: Features, *, shown: int, held: int, seed: int) -> None:
        self._features, self._shown, self._held, self._seed = features, shown, held, seed
        self._pieces: dict[int, Piece] = {
            row["token"]: row["bytes"] if row["text"] is None else row["text"] for row in features.tokens().to_pylist()
        }
        firings = features.read(range(features.n_latents), ["firings"])["firings"].to_numpy()
        self.alive: list[int] = firings.nonzero()[0].tolist()
        self._pools = self._pooled(self.by_chance(POOL_LATENTS))

    def by_chance(self, n: int) -> list[int]:
        """`n` of the latents that fire, or all, ascending."""
        return sorted(chance_of(self._seed, "latents").sample(self.alive, min(n, len(self.alive))))

    def wanted(self, latents: int | tuple[int, ...] | None) -> list[int]:
        """The latents that are to be labelled, ascending; UserError where one does not exist or fire, or none fires."""
        if not self.alive:
            raise UserError(
                f"no latent fires in the feature data {self._features.folder}, so there is nothing to label; train "
                "the dictionary longer or with a lower train.lr, then write the data: `sae-dist pages RUN data=true`"
            )
        if not isinstance(latents, tuple):
            return self.alive if latents is None else self.by_chance(latents)
        n, alive = self._features.n_latents, set(self.alive)
        for latent in latents:
            if latent >= n:
                raise UserError(f"label.latents: {latent} is not there; the dictionary has 0 to {n - 1}")
            if latent not in alive:
                raise UserError(
                    f"label.latents: {latent} never fires in the feature data, so that nothing is known of it; "
                    "leave it out"
                )
        return sorted(set(latents))

    def read(self, latents: Sequence[int]) -> Iterator[Evidence]:
        """The evidence of each of these."""
        for row in self._features.read(latents, COLUMNS).to_pylist():
            latent = row["latent"]
            passages = list(self._passages(row["contexts"]))
            shown, held = split(passages, seed=self._seed, latent=latent)
            shown, held = shown[: self._shown], held[: self._held]
            known = {(p.doc, p.pos - p.at + place) for p in passages for place in p.active}
            rates = self._rates(row)
            others, held_others = (
                _others(pool, like, known=known, rates=rates, chance=chance_of(self._seed, f"{latent} {side}"))
                for side, pool, like in zip(("shown", "held"), self._pools, (shown, held), strict=True)
            )
            promoted = tuple(joined([self._pieces.get(token, "")]) for token in row["promoted"])
            yield Evidence(latent, promoted, shown, others, held, held_others)

    def _rates(self, row: Mapping[str, Any]) -> dict[str | None, float]:
        """On which share of the tokens of each category the latent fires."""
        of_category = zip(
            self._features.categories, row["category_firings"], self._features.about["category_rows"], strict=True
        )
        return {None: row["density"]} | {name: fired / max(rows, 1) for name, fired, rows in of_category}

    def _passages(self, contexts: Sequence[Mapping[str, Any]]) -> Iterator[Passage]:
        names = self._features.categories
        for one in contexts:
            number: int = one["category"]
            category = names[number] if number >= 0 else None
            pieces = tuple(self._pieces.get(token, "") for token in one["tokens"])
            yield Passage(
                pieces, one["at"], tuple(one["active"]), one["value"], one["interval"], category, one["doc"], one["pos"]
            )

    def _pooled(self, latents: Sequence[int]) -> tuple[Pooled, Pooled]:
        """What is drawn from for the labeller, and for the scores."""
        pools: tuple[Pooled, Pooled] = ({}, {})
        for row in self._features.read(latents, ["latent", "contexts"]).to_pylist():
            sides = split(list(self._passages(row["contexts"])), seed=self._seed, latent=row["latent"])
            for pool, side in zip(pools, sides, strict=True):
                for passage in side:
                    pool.setdefault(passage.category, []).append(passage)
        return pools


def split(passages: Sequence[Passage], *, seed: int, latent: int) -> tuple[list[Passage], list[Passage]]:
    """What is shown and what is held out, about half of the strongest and half of each chance interval.

    All passages of a document are on one side. Each side is in an order by chance in which intervals alternate, so
    that its first few have both strong and weak ones.
    """
    order = chance_of(seed, f"split {latent}").sample(passages, len(passages))
    side_of: dict[int, int] = {}
    counts: Counter[tuple[int, int]] = Counter()  # by side and interval
    sides: tuple[list[tuple[int, Passage]], ...] = ([], [])
    for passage in sorted(order, key=lambda p: p.interval):
        fewer = min((0, 1), key=lambda side: (counts[side, passage.interval], len(sides[side])))
        side = side_of.setdefault(passage.doc, fewer)
        sides[side].append((counts[side, passage.interval], passage))
        counts[side, passage.interval] += 1
    shown, held = ([passage for _, passage in sorted(side, key=lambda each: each[0])] for side in sides)
    return shown, held


def _others(
    pool: Pooled,
    like: Sequence[Passage],
    *,
    known: set[tuple[int, int]],
    rates: Mapping[str | None, float],
    chance: random.Random,
) -> list[Passage]:
    """A passage of another latent for each of `like`, of its category, or of any where the latent fires too often.

    Fewer where the pool has too few; none where the latent fires too often everywhere.
    """
    rare = [category for category in sorted(pool, key=str) if rates[category] <= TOO_OFTEN]
    sizes, found = [len(pool[category]) for category in rare], dict[tuple[int, int], Passage]()
    for passage in like if rare else ():
        for _ in range(TRIES):
            category = passage.category if passage.category in rare else chance.choices(rare, sizes)[0]
            drawn = chance.choice(pool[category])
            if (place := (drawn.doc, drawn.pos)) not in known and place not in found:
                found[place] = drawn
                break
    return list(found.values())


def chance_of(seed: int, name: str) -> random.Random:
    """Random numbers that depend on nothing but these two."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big"))


def joined(pieces: Iterable[Piece]) -> str:
    """The text of tokens one after the other; bytes that are no whole characters become the replacement character."""
    return b"".join(p if isinstance(p, bytes) else p.encode(errors="replace") for p in pieces).decode(errors="replace")
