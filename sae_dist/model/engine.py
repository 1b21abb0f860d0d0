"""The seam between a harvest and what runs the model: an engine turns tokens into activations at hook points.

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
    """What a harvest needs of a language model. Calls of one engine come one at a time.

    In a tensor-parallel replica every process makes the same calls with the same tokens in the same order; every one of
    them gets the whole activations.
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
        """Where tokens are wanted and activations appear."""
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
        """About how much memory a token of a batch takes while it is in the model, in the process that has most."""
        ...


class Description(NamedTuple):
    """What a store records of the model that fills it; the same however the model is spread."""

    model: str
    fingerprint: str
    widths: dict[str, int]  # by hook point


def describe(engine: Engine, hooks: Sequence[str]) -> Description:
    """The engine's description; in a tensor-parallel replica all processes must ask. UserError for an unknown hook."""
    return Description(engine.name, engine.fingerprint, {hook: engine.width(hook) for hook in hooks})


def open_engine(config: ModelConfig, group: ReplicaGroup = ONE_PROCESS) -> Engine:
    """The engine that `config` asks for, with its model in memory; raises `UserError` when it cannot be had.

    In a `group` of several processes each calls this, and together they hold the model.
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
    """The model as modules, which evaluation and feature pages rewrite and read: the engine's, or one loaded now."""
    return engine if isinstance(engine, LanguageModel) else load(config)
