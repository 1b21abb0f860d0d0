"""`sae_dist.language_model`: the language model of a run."""

from os import PathLike
from pathlib import Path

from sae_dist.config import UserError, load
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import LanguageModel
from sae_dist.model.load import load as load_model
from sae_dist.service.run_folder import read_config


def language_model(run: str | PathLike[str]) -> LanguageModel:
    """The model whose activations a run's dictionary is of: `.model` and `.tokenizer` are those of transformers.

    UserError where there is no run of `sae-dist run`, or its model cannot be loaded.
    """
    values = read_config(Path(run).expanduser())
    if "model" not in values:
        raise UserError(f"{run} is a run of `sae-dist train`: it does not say its model; load that with transformers")
    return load_model(load(ModelConfig, values["model"]))
