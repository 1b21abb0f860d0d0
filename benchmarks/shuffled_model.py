"""A model whose weights mean nothing: a control, since a dictionary of it can have no features that it has learned."""

from pathlib import Path

import torch

from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load


def shuffled_model(of: ModelConfig, folder: Path) -> Path:
    """The model with weights permuted within every matrix but the embeddings, as a folder; as it is if it is there."""
    if not (folder / "config.json").exists():
        own = load(of)
        chance = torch.Generator().manual_seed(0)
        embeddings = {id(own.model.get_input_embeddings().weight), id(own.model.get_output_embeddings().weight)}
        for weight in own.model.parameters():
            if weight.ndim > 1 and id(weight) not in embeddings:
                weight.data = weight.flatten()[torch.randperm(weight.numel(), generator=chance)].view_as(weight)
        own.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        own.model.save_pretrained(folder)
    return folder
