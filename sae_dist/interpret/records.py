"""Latents as the JSON values that the pages read."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.interpret.collect import UNLABELLED, Collected, PagesConfig, document_id
from sae_dist.interpret.contexts import Contexts, Intervals, Shading
from sae_dist.interpret.logit_effect import LogitEffects
from sae_dist.interpret.similar import Similar
from sae_dist.interpret.vocabulary import Decode

LABEL_TOKENS = 5  # of each latent in the index
PROMOTED_TOKENS = 3
CATEGORIES = 8  # on the page of a latent


class Stream(Protocol):
    """What is needed of the tokens of a corpus."""

    context: int

    def category(self, doc: int) -> str | None: ...
    def locate(self, doc: int, pos: int) -> tuple[int, int]: ...
    def window(self, doc: int, pos: int, before: int, after: int) -> tuple[Iterable[int], int]: ...


class ContextText(NamedTuple):
    """The tokens of all contexts, end to end."""

    tokens: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n_contexts_1"]
    at: Int[np.ndarray, " n_contexts"]  # where in its window the context's own token is
    category: Int[np.ndarray, " n_contexts"]  # number of the document's category, -1 when nothing is labelled


def context_text(contexts: Contexts, categories: Sequence[str], stream: Stream, config: PagesConfig) -> ContextText:
    """The tokens round every context, as far as the model read them together with it."""
    number = {name: i for i, name in enumerate(categories)}
    windows, index, category = [np.zeros(0, np.int64)], [], []
    for signed, pos in zip(contexts.doc.tolist(), contexts.pos.tolist(), strict=True):
        doc = document_id(signed)
        offset = stream.locate(doc, pos)[1]
        before, after = min(config.tokens_before, offset), min(config.tokens_after, stream.context - 1 - offset)
        tokens, at = stream.window(doc, pos, before, after)
        windows.append(np.asarray(tokens, dtype=np.int64))
        index.append(at)
        category.append(number.get(stream.category(doc) or UNLABELLED, -1))
    return ContextText(
        np.concatenate(windows), np.cumsum([len(w) for w in windows]), np.array(index, int), np.array(category, int)
    )


def labels(contexts: Contexts, text: ContextText, decode: Decode, *, n_paged: int) -> list[list[int]]:
    """The tokens that each latent fires on, by their share of the shown activation; one spelling of a word."""
    peaks = text.tokens[text.start[:-1] + text.at].tolist()
    word = {token: _word(decode(token)) for token in set(peaks)}
    weight: list[dict[str | bytes, float]] = [{} for _ in range(n_paged)]
    spelling: list[dict[str | bytes, int]] = [{} for _ in range(n_paged)]
    for slot, token, value in zip(contexts.slot.tolist(), peaks, contexts.value.tolist(), strict=True):
        weight[slot][word[token]] = weight[slot].get(word[token], 0.0) + value
        spelling[slot].setdefault(word[token], token)  # that of the strongest context
    return [
        [spellings[w] for w in sorted(weights, key=weights.__getitem__, reverse=True)[:LABEL_TOKENS]]
        for weights, spellings in zip(weight, spelling, strict=True)
    ]


def _word(piece: str | bytes) -> str | bytes:
    return piece if isinstance(piece, bytes) else piece.strip().casefold() or piece


def index_columns(
    collected: Collected, token_labels: list[list[int]], effects: LogitEffects, used: Int[np.ndarray, " n_used"]
) -> dict[str, Any]:
    """The table of all latents, column by column; tokens are places in `used`."""
    share, base = category_shares(collected)
    best = share.argmax(-1) if len(base) else np.full(len(share), -1)
    purity = share.max(-1, initial=0)
    tokens = [np.searchsorted(used, t).tolist() for t in token_labels]
    return {
        "count": collected.firings.tolist(),
        "maximum": rounded(collected.maximum).tolist(),
        "mean": rounded(collected.total / collected.firings.clamp(min=1)).tolist(),
        "category": best.tolist(),
        "purity": np.round(purity, 3).tolist(),
        "paged": None if len(collected.paged) == len(collected.firings) else collected.paged.tolist(),
        "tokens": tokens,
        "promoted": np.searchsorted(used, effects.promoted[:, :PROMOTED_TOKENS].numpy()).tolist(),
    }


def category_shares(
    collected: Collected,
) -> tuple[Float[np.ndarray, "n_latents n_categories"], Float[np.ndarray, " n_categories"]]:
    """Each category's share of a latent's activation, and its share of all tokens, which is the chance level."""
    total = collected.category_total / collected.total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return total.numpy(), (collected.category_rows / max(1, collected.rows)).numpy()


def latent_records(
    *,
    collected: Collected,
    contexts: Contexts,
    intervals: Intervals,
    shading: Shading,
    effects: LogitEffects,
    similar: Similar,
    text: ContextText,
    used: Int[np.ndarray, " n_used"],
) -> Iterator[dict[str, Any]]:
    """One value for each paged latent; tokens are places in `used`, those of contexts 16 or 32 bits wide, base64."""
    places = np.searchsorted(used, text.tokens).astype(token_dtype(used))
    share, _ = category_shares(collected)
    first = np.searchsorted(contexts.slot.numpy(), np.arange(len(collected.paged) + 1))
    promoted, suppressed = (np.searchsorted(used, t.numpy()).tolist() for t in (effects.promoted, effects.suppressed))
    up, down = rounded(effects.promoted_by).tolist(), rounded(effects.suppressed_by).tolist()
    begin, offset, shade = shading.start.tolist(), shading.offset.numpy(), rounded(shading.value)
    edges = rounded(intervals.edges).tolist()
    value = rounded(contexts.value).tolist()
    for slot, latent in enumerate(collected.paged.tolist()):
        low, high = first[slot], first[slot + 1]
        shown = []
        for i in range(low, high):
            near = slice(begin[i], begin[i + 1])
            at = offset[near] + text.at[i]
            length = int(text.start[i + 1] - text.start[i])
            inside = (at >= 0) & (at < length)
            active = [x for pair in zip(at[inside].tolist(), shade[near][inside].tolist(), strict=True) for x in pair]
            interval = int(contexts.interval[i])
            shown.append([interval, value[i], int(text.category[i]), length, int(text.at[i]), active])
        bins = collected.histogram[latent]
        order = np.argsort(-share[latent], kind="stable")[:CATEGORIES]
        yield {
            "id": latent,
            "contexts": shown,
            "text": base64.b64encode(places[text.start[low] : text.start[high]].tobytes()).decode(),
            "intervals": [edges[slot], intervals.firings[slot].tolist()],
            "histogram": [float(2.0 ** int(collected.exponent[latent].clamp(min=-126))), bins.tolist()],
            "promoted": [promoted[slot], up[slot]],
            "suppressed": [suppressed[slot], down[slot]],
            "similar": [similar.latents[latent].tolist(), np.round(similar.cosine[latent].numpy(), 3).tolist()],
            "categories": [
                [int(c), round(float(share[latent, c]), 4), int(collected.category_count[latent, c])]
                for c in order
                if share[latent, c] > 0
            ],
        }


def token_dtype(used: Int[np.ndarray, " n_used"]) -> str:
    """Little-endian unsigned integers that hold a place in `used`."""
    return "<u2" if len(used) <= 1 << 16 else "<u4"


def rounded(values: Float[Tensor, "*shape"], digits: int = 4) -> Float[np.ndarray, "*shape"]:
    """Numbers with at most `digits` significant digits, which JSON writes as briefly."""
    exact = values.double().numpy()
    magnitude = np.floor(np.log10(np.abs(exact), where=exact != 0, out=np.zeros_like(exact)))
    scale = 10.0 ** (digits - 1 - magnitude)
    return np.round(exact * scale) / scale
