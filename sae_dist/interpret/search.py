"""Which latents, in which order: the questions of the list of latents and of `Features.search`.

The static pages answer the same questions in the browser (static/source.js), where a dictionary is small enough.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from sae_dist.interpret.feature_index import Index

SORTS: dict[str, Callable[[Index], np.ndarray]] = {
    "latent": lambda index: np.arange(len(index.firings)),
    "max": lambda index: index.max,
    "density": lambda index: index.firings,
    "purity": lambda index: index.purity,
    "mean": lambda index: index.mean,
}
WORDS = re.compile(r'(?:cat:|promotes:|label:)?"[^"]*"?|\S+')
WORD = re.compile(r'(cat:|promotes:|label:)?(?:"([^"]*)"?|(.*))', re.DOTALL)


class Query(NamedTuple):
    """What is looked for: latents that have every word of `words`, and figures within both ranges."""

    words: str = ""  # token  "whole token"  promotes:token  cat:category  label:text  1234
    sort: str = "latent"  # a key of SORTS
    descending: bool = False
    silent: bool = False  # also latents that never fired
    density: tuple[float, float] | None = None
    max: tuple[float, float] | None = None


class Searched(NamedTuple):
    """What words are looked for in."""

    of: Index
    rows: int  # of the stream
    tokens: pa.StringArray  # the text of each token by its id, in lower case, "" where it has none
    categories: Sequence[str]
    labels: pa.StringArray | None  # by latent


def select(searched: Searched, query: Query) -> Int[np.ndarray, " n"]:
    """Numbers of the latents that match, in order; equals by number."""
    index = searched.of
    chosen = np.ones(len(index.firings), bool) if query.silent else index.firings > 0
    for values, among in ((index.firings / searched.rows, query.density), (index.max, query.max)):
        if among is not None:
            chosen &= (among[0] <= values) & (values <= among[1])
    for word in WORDS.findall(query.words.lower()):
        field, quoted, plain = WORD.fullmatch(word).groups()  # pyright: ignore[reportOptionalMemberAccess]  it always is
        if quoted is not None or plain:
            chosen &= _has(searched, field, plain if quoted is None else quoted.strip(), whole=quoted is not None)
    latents = chosen.nonzero()[0].astype(np.int32)
    key = SORTS[query.sort](index)[latents]
    return latents[np.argsort(-key if query.descending else key, kind="stable")]


def _has(searched: Searched, field: str | None, wanted: str, *, whole: bool) -> Bool[np.ndarray, " n"]:
    """Which latents have a word: all of a token, category or label if `whole`, else a part of it."""
    index = searched.of
    match field:
        case "cat:":
            return _in_category(searched, wanted, whole=whole)
        case "promotes:":
            return index.promoted.with_any(_texts_with(searched.tokens, wanted, whole=whole))
        case "label:":
            return _labelled(searched, wanted, whole=whole)
    found = index.fires_on.with_any(_texts_with(searched.tokens, wanted, whole=whole))
    if not whole:
        found |= _in_category(searched, wanted, whole=False) | _labelled(searched, wanted, whole=False)
        number = re.fullmatch(r"#?(0|[1-9][0-9]{0,9})", wanted)
        if number is not None and int(number[1]) < len(found):
            found[int(number[1])] = True
    return found


def _texts_with(texts: pa.StringArray, wanted: str, *, whole: bool) -> Bool[np.ndarray, " n_texts"]:
    """Which texts are `wanted`, without the space round them, or have it as a part; all are in lower case."""
    if whole:
        same = pc.call_function("equal", [pc.call_function("utf8_trim_whitespace", [texts]), wanted])
    else:
        same = pc.call_function("match_substring", [texts], pc.MatchSubstringOptions(wanted))
    return same.fill_null(False).to_numpy(zero_copy_only=False)


def _in_category(searched: Searched, wanted: str, *, whole: bool) -> Bool[np.ndarray, " n"]:
    names = pa.array([name.lower() for name in searched.categories], pa.string())
    return np.append(_texts_with(names, wanted, whole=whole), False)[searched.of.category]  # -1 is the last place


def _labelled(searched: Searched, wanted: str, *, whole: bool) -> Bool[np.ndarray, " n"]:
    if searched.labels is None:
        return np.zeros(len(searched.of.firings), bool)
    return _texts_with(pc.call_function("utf8_lower", [searched.labels]), wanted, whole=whole)
