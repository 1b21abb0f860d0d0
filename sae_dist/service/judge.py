"""Evaluation and feature pages of a run's dictionary, beside the model that they need."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_dist.evaluate.evaluate import evaluate_loss, evaluate_reconstruction
from sae_dist.harvest.rows import eligible
from sae_dist.interpret.site import feature_pages
from sae_dist.interpret.vocabulary import decoder
from sae_dist.model.load import LanguageModel
from sae_dist.model.logits import unembedding
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.service.config import RunConfig
from sae_dist.shards.reader import Store, unit_rows
from sae_dist.text.stream import TokenStream
from sae_dist.text.tokenize import separator


def evaluate(config: RunConfig, language_model: LanguageModel, *, store: Store, stream: TokenStream) -> dict[str, Any]:
    """All figures: reconstruction on the store's held-out units, cross-entropies on held-out sequences."""
    dictionary = dictionary_file.load(config.folder / "dictionary")
    mean = torch.as_tensor(store.statistics(config.hook, store.meta.train_units).mean, dtype=torch.float32)
    split_token = separator(language_model.tokenizer)
    return evaluate_reconstruction(dictionary, store, config.hook, config.evaluate) | evaluate_loss(
        dictionary, language_model, config.hook, stream=stream, mean=mean, config=config.evaluate,
        positions=lambda tokens: eligible(tokens, config.harvest.rows, split_token),
    )  # fmt: skip


def pages(
    config: RunConfig, language_model: LanguageModel, *, store: Store, stream: TokenStream, summary: Mapping[str, Any]
) -> Path:
    """The static site of a run, from the rows that its dictionary was trained on."""
    dictionary = dictionary_file.load(config.folder / "dictionary")
    tokenizer = language_model.tokenizer

    def rows() -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        for unit in range(store.meta.train_units):
            for part in unit_rows(store, config.hook, unit, 8192):
                yield part.x.float(), part.doc, part.pos

    return feature_pages(
        config.folder, rows, encode=dictionary.encode, W_dec=dictionary.parameters.W_dec,
        W_U=unembedding(language_model.model), stream=stream, decode=decoder(tokenizer),
        special=tokenizer.all_special_ids, summary=summary, config=config.pages,
    )  # fmt: skip
