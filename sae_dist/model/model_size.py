"""A language model's shape without its weights: what planning needs to know of it, in seconds and without memory."""

from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from sae_dist.config import UserError
from sae_dist.model import cost, hooks
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import architecture


class ModelSize(NamedTuple):
    """What one hook point of a model comes to."""

    width: int
    parameters: int  # of the layers that a token passes up to the hook point; the embedding is a look-up


def model_size(config: ModelConfig, hook: str) -> ModelSize:
    """Width and parameters, read off a model of fake tensors, which have shapes and no numbers.

    UserError when the model's configuration cannot be had, for a hook point that is not there, and for a model whose
    forward pass looks at numbers.
    """
    settings = architecture(config)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(settings)
        model.config.name_or_path = config.name
        try:
            width = hooks.width(model, hook)
        except RuntimeError as error:
            raise UserError(
                f"model.name={config.name}: the width of hook={hook} cannot be told without its weights "
                f"({str(error).strip().splitlines()[0]}); set d_model and subject_parameters"
            ) from error
        return ModelSize(width, sum(p.numel() for part in cost.layers_run(model, [hook]) for p in part.parameters()))
