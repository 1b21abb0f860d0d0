"""Preparation of a harvest: tokenise the text, check the model, create the store."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist import storage
from sae_dist.config import to_dict
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.units import unit_counts
from sae_dist.model.check import check_evaluation, check_forward, check_pages, check_text
from sae_dist.model.config import ModelConfig
from sae_dist.model.engine import Description, describe, open_engine
from sae_dist.model.load import LanguageModel, Tokenizer, load_tokenizer
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.writer import create
from sae_dist.text import corpus
from sae_dist.text.corpus import TextConfig
from sae_dist.text.tokenize import TokenSplit, chat_template, separator, tokenize, tokenizer_fingerprint


class Prepared(NamedTuple):
    """The training and held-out tokens, the store's description, and facts for the display."""

    split: TokenSplit
    meta: StoreMeta
    facts: dict[str, Any]


def prepare(
    *,
    model: ModelConfig,
    hook_points: Sequence[str],
    text: TextConfig,
    harvest: HarvestConfig,
    folder: Path,
    store_uri: str,
    progress: Callable[[Mapping[str, Any]], None],
    describe_on_cluster: Callable[[], Description] | None = None,
    evaluated: bool = False,
    pages: bool = False,
) -> Prepared:
    """Tokenises the text under `folder` and creates the store, unless both exist.

    UserError, within seconds, when the model or a hook point cannot be harvested, or cannot be evaluated (`evaluated`)
    or shown (`pages`). The model is loaded here for that, unless `describe_on_cluster` is given.
    """
    text_fingerprint = corpus.fingerprint(text)  # first: a missing file is found before a model is loaded for nothing
    tokenizer = load_tokenizer(model)
    check_text(model, tokenizer, context=harvest.context, separator=separator(tokenizer))
    template = chat_template(text, tokenizer)
    if describe_on_cluster is not None:
        description = describe_on_cluster()
    else:
        engine = open_engine(model)
        description = describe(engine, hook_points)
        if isinstance(engine, LanguageModel):
            _check_model(engine, hook_points, harvest.context, evaluated=evaluated, pages=pages)
    n_train, n_heldout = unit_counts(harvest)
    per_unit = harvest.unit_sequences * harvest.context
    wanted = (n_train + n_heldout) * per_unit
    split = tokenize(
        text, tokenizer, context=harvest.context, n_tokens=wanted,
        heldout_fraction=n_heldout * per_unit / wanted, seed=harvest.seed, folder=folder,
        progress=lambda done, total: progress({"tokens": done, "of": total}),
    )  # fmt: skip
    meta = _meta(description, tokenizer, text_fingerprint=text_fingerprint, tokens=split.digest, harvest=harvest)
    if template is not None:  # which tokens of conversations are rows
        meta = dataclasses.replace(meta, extra=meta.extra | template.identity)
    create(storage.open(store_uri), meta)
    facts = {
        "tokens": len(split.train.tokens),
        "held out": len(split.heldout.tokens),
        "documents": len(split.train.doc_ids) + len(split.heldout.doc_ids),
        "units": meta.n_units,
        **{f"{what} documents": n for what, n in split.counts.items()},
    }
    return Prepared(split, meta, facts)


def _check_model(
    model: LanguageModel, hook_points: Sequence[str], context: int, *, evaluated: bool, pages: bool
) -> None:
    """Tries on one sequence everything that replicas will do with the model."""
    check_forward(model, hook_points, context)
    for hook in hook_points:
        if evaluated:
            check_evaluation(model, hook, context)
        if pages:
            check_pages(model, hook)


def _meta(
    description: Description, tokenizer: Tokenizer, *, text_fingerprint: str, tokens: str, harvest: HarvestConfig
) -> StoreMeta:
    n_train, n_heldout = unit_counts(harvest)
    return StoreMeta(
        model=description.model,
        model_fingerprint=description.fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        text_fingerprint=text_fingerprint,
        context=harvest.context,
        hooks=description.widths,
        n_units=n_train + n_heldout,
        heldout_units=n_heldout,
        unit_rows=harvest.unit_sequences * (harvest.context - harvest.rows.drop_first),
        slice_rows=harvest.slice_rows,
        dtype=harvest.dtype,
        seed=harvest.seed,
        extra={
            "rows": json.dumps(to_dict(harvest.rows), sort_keys=True),
            "tokens": str(harvest.tokens),
            "heldout_tokens": str(harvest.heldout_tokens),
            "unit_sequences": str(harvest.unit_sequences),
            "token_streams": tokens,
        },
    )
