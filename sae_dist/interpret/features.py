"""Feature data: what is known of every latent, as Parquet sorted by latent (docs/features.md is the specification).

Rows are encoded once and every activation is kept on disk, sorted by latent. Then latents are described some thousands
at a time, so memory depends on neither the number of latents nor that of rows. Files are complete or absent: repeated
after a stop, the work goes on where it was.
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist import checksums
from sae_dist.config import to_dict
from sae_dist.interpret import spool
from sae_dist.interpret.collect import UNLABELLED, Encode, PagesConfig, RowBatches, collect, document_id
from sae_dist.interpret.contexts import choose, shade
from sae_dist.interpret.feature_index import write_index
from sae_dist.interpret.feature_table import SCHEMA, table
from sae_dist.interpret.logit_effect import Unembedding, logit_effects
from sae_dist.interpret.parquet import write_parquet
from sae_dist.interpret.records import Stream, context_text, labels
from sae_dist.interpret.site import finite
from sae_dist.interpret.vocabulary import Decode
from sae_dist.progress import logged
from sae_dist.run_files import write_json

logger = logging.getLogger(__name__)

FORMAT = 2
ABOUT, TOKENS, BEGUN = "features.json", "tokens.parquet", "begun.json"
AT_ONCE = 4096  # latents that are described together
FILE_LATENTS = 256  # of one file
GROUP_LATENTS = 16  # of one row group, the least that is read
SPOOL = "activations"  # removed once all files are there


class Categories(NamedTuple):
    """Kinds of text, sorted, and the rows of each; none when no document has one."""

    names: tuple[str, ...]
    rows: list[int]
    of_doc: Callable[[int], str | None]


def write_features(
    out: Path,
    rows: Callable[[], RowBatches],
    *,
    encode: Encode,
    W_dec: Float[Tensor, "n_latents d_model"],
    outputs: Unembedding | str,
    stream: Stream,
    decode: Decode,
    vocabulary: Collection[int],
    special: Collection[int] = (),
    about: Mapping[str, Any],
    summary: Mapping[str, Any] | None = None,
    config: PagesConfig,
    at_once: int = AT_ONCE,
) -> Path:
    """Writes `<out>/features`, whole or not at all, and returns it; repeated after a stop it goes on.

    `about` tells one dictionary and stream from another; work on something else is removed. `outputs` may be a reason
    why latents have no direct effect on the logits. `vocabulary` are the ids of all tokens, `special` those without
    text of their own. `summary` are figures of the run, to be shown beside. `at_once` latents are described together,
    a multiple of FILE_LATENTS; the result does not depend on it.
    """
    partial, folder, n_latents = out / "features.partial", out / "features", len(W_dec)
    about = {
        "format": FORMAT, **about, "n_latents": n_latents, "no_outputs": outputs if isinstance(outputs, str) else None,
        "config": {key: value for key, value in to_dict(config).items() if key not in ("max_latents", "similar")},
    }  # fmt: skip
    _begin(partial, about)
    parts = spool.spool(partial / SPOOL, rows(), encode, tokens=config.tokens)
    categories = _categories(parts, stream)
    total = sum(len(part.doc) for part in parts)
    firsts = range(0, n_latents, at_once)
    for first in logged(firsts, "described", len(firsts), of=f"times {at_once:,} latents"):
        last = min(first + at_once, n_latents)
        files = [start for start in range(first, last, FILE_LATENTS) if not (partial / file_name(start)).exists()]
        if files:
            found = _describe(
                parts, first, last, total=total, W_dec=W_dec[first:last], outputs=outputs, stream=stream, decode=decode,
                categories=categories, config=config,
            )  # fmt: skip
            for start in files:
                _write(partial / file_name(start), found.slice(start - first, FILE_LATENTS))
    _write(partial / TOKENS, _tokens(vocabulary, special, decode))
    write_index(partial, map(file_name, range(0, n_latents, FILE_LATENTS)))
    facts = {
        "rows": total,
        "categories": categories.names,
        "category_rows": categories.rows,
        "summary": finite(summary or {}),
    }
    write_json(partial / ABOUT, about | facts | {"file_latents": FILE_LATENTS, "group_latents": GROUP_LATENTS})
    shutil.rmtree(partial / SPOOL)
    (partial / BEGUN).unlink()
    checksums.write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def file_name(first: int) -> str:
    """The file of the latents from `first` on."""
    return f"latents-{first:09d}.parquet"


def _begin(partial: Path, about: Mapping[str, Any]) -> None:
    """A folder for this work: that of an earlier try at the same, or an empty one."""
    begun, text = partial / BEGUN, json.dumps(about, indent=1, sort_keys=True)
    if begun.is_file() and begun.read_text() == text:
        logger.info("going on with the feature data in %s", partial)
        return
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    begun.write_text(text)


def _categories(parts: Sequence[spool.Part], stream: Stream) -> Categories:
    counted: dict[int, int] = {}
    for part in parts:
        for doc, count in zip(*(each.tolist() for each in np.unique(part.doc, return_counts=True)), strict=True):
            counted[doc] = counted.get(doc, 0) + count
    kinds = {document_id(doc): stream.category(document_id(doc)) for doc in counted}
    if set(kinds.values()) <= {None}:
        return Categories((), [], lambda _: None)
    rows: dict[str, int] = {}
    for doc, count in counted.items():
        name = kinds[document_id(doc)] or UNLABELLED
        rows[name] = rows.get(name, 0) + count
    names = tuple(sorted(rows))
    return Categories(names, [rows[name] for name in names], lambda doc: kinds[doc] or UNLABELLED)


def _describe(
    parts: Sequence[spool.Part],
    first: int,
    last: int,
    *,
    total: int,
    W_dec: Float[Tensor, "n d_model"],
    outputs: Unembedding | str,
    stream: Stream,
    decode: Decode,
    categories: Categories,
    config: PagesConfig,
) -> pa.Table:
    """The rows of latents from `first` to before `last`."""
    n = last - first
    everything = PagesConfig(**{**to_dict(config), "max_latents": n, "tokens": max(total, 1)})
    collected = collect(
        spool.of_latents(parts, first, last), spool.encode, n_latents=n, category=categories.of_doc, config=everything,
        first=first,
    )  # fmt: skip
    contexts, intervals = choose(collected, everything)
    text = context_text(contexts, categories.names, stream, everything)
    shading = shade(
        spool.of_latents(parts, first, last), spool.encode, collected=collected, contexts=contexts, config=everything
    )
    number = [categories.names.index(name) for name in collected.categories]
    category_firings = torch.zeros(n, len(categories.names), dtype=torch.int64)
    category_firings[:, number] = collected.category_count
    share = torch.zeros(n, len(categories.names), dtype=torch.float64)
    share[:, number] = collected.category_total
    return table(
        first, rows=total, squares=_squares(parts, first, last), collected=collected, intervals=intervals,
        contexts=contexts, shading=shading, text=text, fires_on=labels(contexts, text, decode, n_paged=n),
        category_firings=category_firings, category_share=share / collected.total.clamp(min=1e-300)[:, None],
        effects=logit_effects(W_dec, outputs, n_tokens=config.logits),
    )  # fmt: skip


def _squares(parts: Sequence[spool.Part], first: int, last: int) -> Float[Tensor, " n"]:
    """The sum of squared activations of each latent, added row by row, so that parts do not matter."""
    found = np.zeros(last - first)
    for part in parts:
        low, high = np.searchsorted(part.latent, [first, last])
        squared = part.value[low:high].astype(np.float64) ** 2
        np.add.at(found, part.latent[low:high] - first, squared)
    return torch.from_numpy(found)


def _tokens(vocabulary: Collection[int], special: Collection[int], decode: Decode) -> pa.Table:
    """Every token with its text, or with its bytes where these are no whole characters."""
    pieces = {token: decode(token) for token in sorted(vocabulary)}
    texts = [piece.encode(errors="replace").decode() if isinstance(piece, str) else None for piece in pieces.values()]
    raw = [piece if isinstance(piece, bytes) else None for piece in pieces.values()]
    columns = {"token": pa.array(pieces, pa.int32()), "text": pa.array(texts, pa.string())}
    marks = pa.array([token in special for token in pieces], pa.bool_())
    return pa.table(columns | {"bytes": pa.array(raw, pa.binary()), "special": marks})


def _write(path: Path, rows: pa.Table) -> None:
    """Pages have checksums, which reading verifies."""
    size = GROUP_LATENTS if rows.schema.equals(SCHEMA) else max(len(rows), 1)
    write_parquet(
        path, rows, row_group_size=size, use_dictionary=False, write_page_checksum=True, write_statistics=["latent"],
        store_schema=False,
    )  # fmt: skip
