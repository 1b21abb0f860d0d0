"""The size of a language model, without loading its weights: for planning."""

from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from sae_dist.config import UserError
from sae_dist.model import cost, hooks
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import architecture


class ModelSize(NamedTuple):
    """The size of a model up to one hook point."""

    width: int
    parameters: int  # of the layers up to the hook point, without the embedding, which is a look-up


def model_size(config: ModelConfig, hook: str) -> ModelSize:
    """Width and parameters, from a forward pass with fake tensors, which have shapes and no values.

    UserError when the configuration cannot be loaded, the hook point does not exist, or the forward pass needs values.
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
