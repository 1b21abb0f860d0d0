"""A language model's shape without its weights: what planning needs to know of it, in seconds and without memory."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_dist.config import UserError
from sae_dist.model import hooks, smollm2, tiny
from sae_dist.model.anatomy import layers
from sae_dist.model.config import ModelConfig


class Skeleton(NamedTuple):
    """What one hook point of a model comes to."""

    width: int
    parameters: int  # of the layers that a token passes up to the hook point; the embedding is a look-up


def skeleton(config: ModelConfig, hook: str) -> Skeleton:
    """Width and parameters, read off a model of meta tensors; UserError when its configuration cannot be had."""
    if config.name in tiny.TINY:
        model = tiny.model(config.name)
    else:
        source = str(smollm2.checkpoint()) if config.name == "smollm2" else str(Path(config.name).expanduser())
        try:
            settings = AutoConfig.from_pretrained(
                source if Path(source).is_dir() else config.name, revision=config.revision, trust_remote_code=False
            )
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(settings)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.name={config.name}: its configuration cannot be read ({str(error).strip().splitlines()[0]}); "
                "set d_model and subject_parameters instead"
            ) from None
    point = hooks.resolve(model, hook)
    passed = 0
    for layer in layers(model):
        inside = any(module is point.module for module in layer.modules())
        if inside and point.name.startswith("resid_pre"):
            break
        passed += sum(parameter.numel() for parameter in layer.parameters())
        if inside:
            break
    return Skeleton(hooks.width(model, hook), passed)
