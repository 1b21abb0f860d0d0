"""Evaluation and feature pages of a run's dictionary, in the process that has the language model."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_dist import storage
from sae_dist.config import UserError, digest
from sae_dist.config import load as load_config
from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.heldout_rows import evaluate_reconstruction
from sae_dist.evaluate.heldout_text import evaluate_loss
from sae_dist.evaluate.metrics import LOSS, merged, unmeasured
from sae_dist.harvest.config import RowPolicy
from sae_dist.harvest.rows import eligible, row_mask
from sae_dist.interpret.collect import PagesConfig, RowBatches
from sae_dist.interpret.features import write_features
from sae_dist.interpret.logit_effect import Unembedding
from sae_dist.interpret.site import feature_pages
from sae_dist.interpret.vocabulary import decoder
from sae_dist.model.load import LanguageModel, Tokenizer
from sae_dist.model.load import load as load_model
from sae_dist.model.logits import check_direct_path, unembedding
from sae_dist.run_files import write_json
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.service.config import RunConfig, TrainJob
from sae_dist.service.mirror import Mirror
from sae_dist.service.monitoring import tell_judged
from sae_dist.service.prepare import Prepared, prepare
from sae_dist.service.run_folder import claim, read_config
from sae_dist.service.summary import alert_entry, read_summary, weights_digest
from sae_dist.shards import stores
from sae_dist.shards.hooks import Hooks, said_by
from sae_dist.shards.reader import Store, unit_rows
from sae_dist.shards.retention import present_units
from sae_dist.text.stream import TokenStream
from sae_dist.text.tokenize import separator
from sae_dist.train.members import MAIN, folder


def evaluate(
    config: RunConfig,
    language_model: LanguageModel,
    *,
    store: Store,
    stream: TokenStream,
    names: Sequence[str] = (MAIN,),
    progress: Callable[..., None] = lambda **_: None,
) -> dict[str, dict[str, Any]]:
    """All figures of a run's dictionaries of these names, by name.

    Reconstruction is on the store's held-out units, cross-entropies are on held-out sequences.
    """
    dictionaries = [dictionary_file.load(folder(config.folder, name)) for name in names]
    wanted = min(config.evaluate.ce_sequences, stream.n_sequences) * (stream.context - 1)
    rebuilt = evaluate_reconstruction(dictionaries, store, Hooks(config.hooks), config.evaluate)
    if len(config.hooks) > 1:
        none = unmeasured(
            LOSS, "a crosscoder rebuilds several hook points from all of them: none can be replaced alone"
        )
        return {name: merged(own, none) for name, own in zip(names, rebuilt, strict=True)}
    hook = next(iter(config.hooks))
    mean = torch.as_tensor(store.statistics(hook, store.meta.train_units).mean, dtype=torch.float32)
    losses = evaluate_loss(
        dictionaries, language_model, hook, stream=stream, mean=mean, config=config.evaluate,
        positions=row_positions(config.harvest.rows, language_model.tokenizer, stream),
        progress=lambda tokens: progress(ce_tokens=tokens, of=wanted),
    )  # fmt: skip
    return {name: merged(*own) for name, *own in zip(names, rebuilt, losses, strict=True)}


def row_positions(policy: RowPolicy, tokenizer: Tokenizer, stream: TokenStream) -> Callable[[Tensor, Tensor], Tensor]:
    """Says of tokens [sequences, context] and activations [sequences, context, width] which ones a harvest keeps.

    Of a stream with conversations only those that count among them become rows.
    """
    opened_by = None if stream.has_conversations else separator(tokenizer)
    return lambda tokens, x: row_mask({"x": x}, eligible(tokens, policy, opened_by), policy).mask


def pages(
    config: RunConfig,
    language_model: LanguageModel,
    *,
    store: Store,
    stream: TokenStream,
    summary: Mapping[str, Any],
    progress: Callable[..., None] = lambda **_: None,
) -> Path:
    """Writes the feature pages of a run from its training rows; returns the path of their index."""
    assert config.pages is not None
    dictionary = dictionary_file.load(config.folder / "dictionary")
    tokenizer = language_model.tokenizer

    def rows() -> RowBatches:
        return _rows(config, store, progress)

    return feature_pages(
        config.folder, rows, encode=dictionary.encode, W_dec=dictionary.parameters.W_dec,
        outputs=_outputs(language_model, config.hooks), stream=stream, decode=decoder(tokenizer),
        special=tokenizer.all_special_ids, summary=summary, config=config.pages,
    )  # fmt: skip


def features(
    config: RunConfig,
    language_model: LanguageModel,
    *,
    store: Store,
    stream: TokenStream,
    summary: Mapping[str, Any],
    pages: PagesConfig,
) -> Path:
    """Writes the feature data of a run from its training rows; returns its folder."""
    dictionary, tokenizer = dictionary_file.load(config.folder / "dictionary"), language_model.tokenizer
    return write_features(
        config.folder, lambda: _rows(config, store, lambda **_: None), encode=dictionary.encode,
        W_dec=dictionary.parameters.W_dec, outputs=_outputs(language_model, config.hooks), stream=stream,
        decode=decoder(tokenizer), vocabulary=sorted(tokenizer.get_vocab().values()),
        special=tokenizer.all_special_ids, summary=summary,
        about={
            "model": config.model.name, "hooks": list(config.hooks),
            "weights": weights_digest(config.folder / "dictionary"),
            "store": digest([store.meta.digest, {unit: one.digest for unit, one in store.committed().items()}]),
        },
        config=pages,
    )  # fmt: skip


def _rows(
    config: RunConfig, store: Store, progress: Callable[..., None]
) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
    """The training rows of a run, unit by unit: activations, documents, positions."""
    present = present_units(store)
    if not present:
        raise UserError(f"harvest.retention has deleted all of store={config.store_uri}; set pages=null, or keep units")
    for unit in present:
        progress(unit=unit, of=store.meta.train_units)
        for part in unit_rows(store, config.hooks, unit, 8192):
            yield part.x.float(), part.doc, part.pos


def _outputs(language_model: LanguageModel, hooks: Sequence[str]) -> Unembedding | str:
    """The unembedding of the tokenizer's tokens, or the reason why what is rebuilt has no direct path to it."""
    if len(hooks) > 1:
        return f"a crosscoder rebuilds {len(hooks)} hook points at once: no one row of it is added to the logits"
    (hook,) = hooks
    try:
        check_direct_path(language_model.model, hook)
        W_U = unembedding(language_model.model).cpu()
    except UserError as why:
        return str(why)
    tokens = torch.tensor(sorted(i for i in language_model.tokenizer.get_vocab().values() if i < W_U.shape[1]))
    return Unembedding(W_U[:, tokens], tokens)


def evaluate_run(out: Path, evaluate_config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a finished run's dictionaries again and updates summary.json, which it returns."""
    with _claimed(out) as (summary, config):
        summary.pop("alerts", None)
        judged = {MAIN: summary} | {one["name"]: one for one in summary.get("also", [])}
        if config is None:
            store = stores.open(storage.open(summary["store"]))
            if not store.meta.heldout_units:
                raise UserError(
                    f"store={summary['store']} has no held-out units to judge on; import it with heldout_fraction"
                )
            dictionaries = [dictionary_file.load(folder(out, name)) for name in judged]
            found = evaluate_reconstruction(dictionaries, store, said_by(summary), evaluate_config)
            for own, figures in zip(judged.values(), found, strict=True):
                own["eval"] = merged(own["eval"], figures)
        else:
            config = dataclasses.replace(config, evaluate=evaluate_config)
            prepared, store = _prepared(config)
            model, stream = load_model(config.model), prepared.split.heldout
            found = evaluate(config, model, store=store, stream=stream, names=list(judged))
            for name, own in judged.items():
                own["eval"] = found[name]
        figures = {name: own["eval"] for name, own in judged.items()}
        tell_judged(out, figures, tokens=summary["tokens_trained"])
        summary |= alert_entry(figures)
        write_json(out / "summary.json", summary)
        return summary


def write_run_pages(out: Path, pages_config: PagesConfig) -> Path:
    """Writes a finished run's feature pages again; returns the path of their index."""
    with _claimed(out) as (summary, config):
        if config is None:
            raise UserError(f"out={out} is a run of `sae-dist train`: it has no text and no model to make pages of")
        config = dataclasses.replace(config, pages=pages_config)
        prepared, store = _prepared(config)
        return pages(config, load_model(config.model), store=store, stream=prepared.split.train, summary=summary)


def write_run_features(out: Path, pages_config: PagesConfig) -> Path:
    """Writes the feature data of a finished run; returns its folder."""
    with _claimed(out) as (summary, config):
        if config is None:
            raise UserError(
                f"out={out} is a run of `sae-dist train`: it has no text and no model to describe latents by"
            )
        prepared, store = _prepared(config)
        return features(
            config, load_model(config.model), store=store, stream=prepared.split.train, summary=summary,
            pages=pages_config,
        )  # fmt: skip


@contextmanager
def _claimed(out: Path) -> Iterator[tuple[dict[str, Any], RunConfig | None]]:
    """Locks a finished run's folder; yields its summary and its config (None for a run of `sae-dist train`)."""
    if not os.path.lexists(out / "summary.json"):
        raise UserError(f"out={out} has no summary.json: the run has not finished; repeat its command first")
    with claim(out):
        values = read_config(out) | {"out": str(out)}
        kind = RunConfig if "model" in values else TrainJob
        try:
            config = load_config(kind, values)
        except UserError as wrong:
            raise UserError(f"{out / 'config.yaml'} is damaged: {wrong}") from None
        copy = None if config.mirror is None else Mirror(out, config.mirror, values)
        yield read_summary(out), config if isinstance(config, RunConfig) else None
        if copy is not None:
            copy.close()


def _prepared(config: RunConfig) -> tuple[Prepared, Store]:
    store = stores.open(storage.open(config.store_uri))  # an existing one: UserError where the run was moved without it
    prepared = prepare(
        model=config.model, hook_points=config.hooks, text=config.text, harvest=config.harvest,
        folder=config.folder / "text", store_uri=config.store_uri, progress=lambda _: None,
    )  # fmt: skip
    return prepared, store
