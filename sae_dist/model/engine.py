"""The interface of whatever runs the model: an engine turns tokens into activations at hook points.

`sae_dist.model.load.LanguageModel` is the engine on Hugging Face transformers: any hook point; whole, tensor-parallel
or spread over devices. `sae_dist.model.vllm` is the one on vLLM: the residual stream only, at serving speed.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import LanguageModel, Tokenizer, load
from sae_dist.model.parallel import ONE_PROCESS, ReplicaGroup
from sae_dist.model.vllm import VllmEngine


class Engine(Protocol):
    """What a harvest needs of a language model. Not thread-safe: make one call at a time.

    In a tensor-parallel replica every process makes the same calls in the same order and gets the whole activations.
    """

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> str:
        """Of the weights: `float32` or `bfloat16`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when architecture, dtype, weights or engine do; the same however the model is spread."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def device(self) -> torch.device:
        """The device of tokens and activations."""
        ...

    def width(self, hook: str) -> int:
        """The size of the hook point's last dim; raises `UserError` for a hook point that the engine cannot give."""
        ...

    def capture(
        self, tokens: Int[Tensor, "batch context"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch context width"]]:
        """The activations at `hooks`, from one forward pass."""
        ...

    def flop_per_token(self, hooks: Sequence[str], context: int) -> float:
        """Floating-point operations of the forward pass, a token, in all processes together."""
        ...

    def bytes_per_token(self, hooks: Sequence[str], context: int) -> int:
        """Approximate memory that a token of a batch takes in the model, in the process that needs most."""
        ...


class Description(NamedTuple):
    """What a store records of its model; the same however the model is distributed."""

    model: str
    fingerprint: str
    widths: dict[str, int]  # by hook point


def describe(engine: Engine, hooks: Sequence[str]) -> Description:
    """The engine's description; in a tensor-parallel replica all processes must ask. UserError for an unknown hook."""
    return Description(engine.name, engine.fingerprint, {hook: engine.width(hook) for hook in hooks})


def open_engine(config: ModelConfig, group: ReplicaGroup = ONE_PROCESS) -> Engine:
    """The engine of `config` with its model loaded; UserError when it cannot be loaded.

    In a `group` of several processes, all call this and each loads its part of the model.
    """
    match config.engine:
        case "hf":
            return load(config, group)
        case "vllm":
            if group.size > 1:
                raise UserError(
                    f"harvest.tensor_parallel={group.size} with model.engine=vllm: vLLM starts its own processes, one "
                    "a GPU that it sees; use harvest.tensor_parallel=1 and harvest.gpus"
                )
            return VllmEngine(config)
    assert_never(config.engine)


def whole_model(engine: Engine, config: ModelConfig) -> LanguageModel:
    """The model as torch modules, which evaluation and feature pages need: the engine's, or one loaded now."""
    return engine if isinstance(engine, LanguageModel) else load(config)
