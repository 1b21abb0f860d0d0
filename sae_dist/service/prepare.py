"""What must be known before anything is harvested: the tokens, the units, and what the store will hold."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist import storage
from sae_dist.config import to_dict
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.units import counts
from sae_dist.model.config import ModelConfig
from sae_dist.model.engine import Description, describe, open_engine
from sae_dist.model.load import Tokenizer, load_tokenizer
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.writer import create
from sae_dist.text import corpus
from sae_dist.text.corpus import TextConfig
from sae_dist.text.tokenize import TokenSplit, tokenize, tokenizer_fingerprint


class Prepared(NamedTuple):
    """The tokens of both sides, the store's description, and what to tell a person."""

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
    describe_elsewhere: Callable[[], Description] | None = None,
) -> Prepared:
    """Tokenises the text under `folder` and creates the store, once; UserError for a hook point that is not there.

    The model is loaded here to describe it, or `describe_elsewhere` does where this process could not hold it.
    """
    text_fingerprint = corpus.fingerprint(text)  # first: a missing file is found before a model is loaded for nothing
    if describe_elsewhere is not None:
        description, tokenizer = describe_elsewhere(), load_tokenizer(model)
    else:
        engine = open_engine(model)
        description, tokenizer = describe(engine, hook_points), engine.tokenizer
    n_train, n_heldout = counts(harvest)
    per_unit = harvest.unit_sequences * harvest.context
    wanted = (n_train + n_heldout) * per_unit
    split = tokenize(
        text, tokenizer, context=harvest.context, n_tokens=wanted,
        heldout_fraction=n_heldout * per_unit / wanted, seed=harvest.seed, folder=folder,
        progress=lambda done, total: progress({"tokens": done, "of": total}),
    )  # fmt: skip
    meta = _meta(description, tokenizer, text_fingerprint=text_fingerprint, tokens=split.digest, harvest=harvest)
    create(storage.open(store_uri), meta)
    facts = {
        "tokens": len(split.train.tokens),
        "held out": len(split.heldout.tokens),
        "documents": len(split.train.doc_ids) + len(split.heldout.doc_ids),
        "units": meta.n_units,
        **{f"{what} documents": n for what, n in split.counts.items()},
    }
    return Prepared(split, meta, facts)


def _meta(
    description: Description, tokenizer: Tokenizer, *, text_fingerprint: str, tokens: str, harvest: HarvestConfig
) -> StoreMeta:
    n_train, n_heldout = counts(harvest)
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
