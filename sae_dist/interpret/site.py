"""Feature pages: a static site that opens from disk, without a server and without a network.

A page opened from disk may not fetch, but may load scripts, so the data are scripts that hand over one JSON value each.
Text of the corpus is hostile: in the data it is escaped to ASCII without "<", in the pages it only ever becomes the
content of a text node, and a content security policy refuses inline scripts.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae_dist import checksums
from sae_dist.config import UserError
from sae_dist.interpret.collect import Collected, Encode, PagesConfig, RowBatches, collect
from sae_dist.interpret.contexts import Contexts, Intervals, Shading, choose, shade
from sae_dist.interpret.logit_effect import LogitEffects, Unembedding, logit_effects
from sae_dist.interpret.records import Stream, context_text, index_columns, labels, latent_records, token_dtype
from sae_dist.interpret.similar import Similar, similar_latents
from sae_dist.interpret.vocabulary import Decode

STATIC = Path(__file__).parent / "static"
SERVED = Path(__file__).parent / "served"  # what a server gives instead
_TAIL = ");\n"  # of a script of data
LATENTS_PER_FILE = 64  # about 0.3 MB: a page reads one file of latents


def feature_pages(
    out: Path,
    rows: Callable[[], RowBatches],
    *,
    encode: Encode,
    W_dec: Float[Tensor, "n_latents d_model"],
    outputs: Unembedding | str,
    stream: Stream,
    decode: Decode,
    special: Collection[int] = (),
    summary: Mapping[str, Any],
    config: PagesConfig,
) -> Path:
    """Writes `<out>/pages` for a dictionary on a stream of activations; `rows` must start the same stream twice.

    `outputs` may be a reason why latents have no direct effect on the logits, which the pages show.
    """
    collected = collect(rows(), encode, n_latents=len(W_dec), category=stream.category, config=config)
    contexts, intervals = choose(collected, config)
    return build(
        out,
        summary,
        collected=collected,
        contexts=contexts,
        intervals=intervals,
        shading=shade(rows(), encode, collected=collected, contexts=contexts, config=config),
        effects=logit_effects(W_dec[collected.paged], outputs, n_tokens=config.logits),
        no_outputs=outputs if isinstance(outputs, str) else None,
        similar=similar_latents(W_dec, n_nearest=config.similar),
        stream=stream,
        decode=decode,
        special=special,
        config=config,
    )


def build(
    out: Path,
    summary: Mapping[str, Any],
    *,
    collected: Collected,
    contexts: Contexts,
    intervals: Intervals,
    shading: Shading,
    effects: LogitEffects,
    no_outputs: str | None = None,
    similar: Similar,
    stream: Stream,
    decode: Decode,
    special: Collection[int] = (),
    config: PagesConfig,
) -> Path:
    """Write `<out>/pages`, whole or not at all and with checksums, and return the path of its index.

    `effects` has a row for each of `collected.paged`, `similar` one for each latent. `no_outputs` says why the effects
    have no tokens. `special` are token ids without
    text of their own. A value of `summary` that is None was not measured.
    """
    text = context_text(contexts, collected.categories, stream, config)
    token_labels = labels(contexts, text, decode, n_paged=len(collected.paged))
    used = np.unique(np.concatenate([text.tokens, effects.promoted.flatten(), effects.suppressed.flatten()]))
    partial, pages = out / "pages.partial", out / "pages"
    if partial.exists():
        shutil.rmtree(partial)
    shutil.copytree(STATIC, partial)
    (partial / "data").mkdir()

    facts = _facts(summary, collected, token_bytes=np.dtype(token_dtype(used)).itemsize)
    write(partial, "summary", facts | {"no_outputs": no_outputs})
    write(partial, "tokens", [shown_token(decode(t), special=t in special) for t in used.tolist()])
    write(partial, "index", index_columns(collected, token_labels, effects, used))
    records = latent_records(
        collected=collected,
        contexts=contexts,
        intervals=intervals,
        shading=shading,
        effects=effects,
        similar=similar,
        text=text,
        used=used,
    )
    for number, batch in enumerate(iter(lambda: list(itertools.islice(records, LATENTS_PER_FILE)), [])):
        write(partial, f"latents-{number}", batch)
    checksums.write(partial)
    if pages.exists():
        shutil.rmtree(pages)
    partial.rename(pages)
    return pages / "index.html"


def _facts(summary: Mapping[str, Any], collected: Collected, *, token_bytes: int) -> dict[str, Any]:
    """The facts that all pages read."""
    return {
        "summary": finite(summary),
        "rows": collected.rows,
        "n_latents": len(collected.firings),
        "categories": collected.categories,
        "category_rows": collected.category_rows.tolist(),
        "latents_per_file": LATENTS_PER_FILE,
        "token_bytes": token_bytes,
    }


def finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is none becomes null, which the pages show as not measured."""
    match value:
        case Mapping():
            return {str(k): finite(v) for k, v in value.items()}
        case list() | tuple():
            return [finite(v) for v in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def shown_token(piece: str | bytes, *, special: bool) -> str | list[str]:
    """A token as the pages read it: its text, ["hex", its bytes] or ["special", its name]."""
    if isinstance(piece, bytes):
        return ["hex", piece.hex()]
    return ["special", piece] if special else piece


def write(pages: Path, name: str, value: Any) -> None:
    """A script that hands `value` to the pages."""
    (pages / "data" / f"{name}.js").write_text(f"{_head(name)}{as_json(value)}{_TAIL}")


def as_json(value: Any) -> str:
    """JSON in ASCII, with no "<" that could end a script or begin a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def read(pages: Path, name: str) -> Any:
    """The value that a script of the pages hands over; UserError where there are no pages, or they are damaged."""
    path, cure = pages / "data" / f"{name}.js", "write the pages again with `sae-dist pages`"
    if not path.is_file():
        raise UserError(f"{path} is missing; {cure}")
    text = path.read_text(encoding="ascii", errors="replace")
    try:
        return json.loads(text.removeprefix(_head(name)).removesuffix(_TAIL))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged; {cure}") from None


def _head(name: str) -> str:
    return f'saePages.receive("{name}",'
