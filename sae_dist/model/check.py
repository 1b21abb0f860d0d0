"""Checks of a model and its tokenizer in the first seconds of a run, before any text is read.

What fails here would fail in every replica, or at the end of a run of days.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.model.config import ModelConfig
from sae_dist.model.hooks import replace
from sae_dist.model.load import LanguageModel, Tokenizer, architecture
from sae_dist.model.logits import check_direct_path, next_token_loss

logger = logging.getLogger(__name__)

_POSITIONS = ("max_position_embeddings", "max_seq_len")  # their names in configurations
_ROUNDING = 0.02  # nats; mixtures of experts may round other tokens differently when one token changes


def check_text(config: ModelConfig, tokenizer: Tokenizer, *, context: int, separator: int | None) -> None:
    """UserError when sequences are longer than the model's positions, or tokens lie beyond its embedding.

    Special tokens that no text is tokenised to may lie beyond it; `separator`, which opens documents, may not.
    """
    whole = architecture(config)
    if getattr(whole, "is_encoder_decoder", False):
        raise UserError(
            f"model.name={config.name} is an encoder-decoder ({whole.model_type}): its decoder never runs without its "
            "encoder's states; use a causal language model"
        )
    settings = whole.get_text_config()
    known = (getattr(settings, name, None) for name in _POSITIONS)
    positions = next((n for n in known if isinstance(n, int) and n > 0), None)
    if positions is not None and context > positions:
        raise UserError(
            f"harvest.context={context}, but model.name={config.name} has {positions} positions; use "
            f"harvest.context={positions} or less"
        )
    rows, special = settings.vocab_size, set(tokenizer.all_special_ids) - {separator}
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and i not in special}
    if beyond:
        token = min(beyond, key=lambda token: beyond[token])
        raise UserError(
            f"model.name={config.name}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of the model's "
            f"embedding, such as {token!r} ({beyond[token]}); give the folder the tokenizer that belongs to the model"
        )


def check_forward(model: LanguageModel, hooks: Sequence[str], context: int) -> None:
    """Runs one sequence of `context` tokens; UserError when the model cannot."""
    with _forward_errors(model, context):
        model.capture(_tokens(model, context), hooks)


def check_evaluation(model: LanguageModel, hook: str, context: int) -> None:
    """UserError when loss recovered cannot be measured: the model has no loss, or is not causal."""
    tokens = _tokens(model, context)
    other = tokens.clone()
    other[:, -1] = tokens[:, 0]
    with _forward_errors(model, context), replace(model.model, {hook: lambda x: x}):
        losses, changed = (next_token_loss(model.model, each)[:, :-1] for each in (tokens, other))
    if losses.numel() and float((losses - changed).abs().max()) > _ROUNDING:
        raise UserError(
            f"model.name={model.name} ({type(model.model).__name__}) is no causal language model: its loss on earlier "
            "tokens follows the last one. Use `sae-dist harvest` and `sae-dist train`, which do without that loss"
        )


def check_pages(model: LanguageModel, hook: str) -> None:
    """Logs a warning when feature pages will have no logit effects."""
    try:
        check_direct_path(model.model, hook)
    except UserError as why:
        logger.warning("feature pages will have no logit effects: %s", why)


def _tokens(model: LanguageModel, context: int) -> Int[Tensor, "1 context"]:
    vocabulary = model.model.config.get_text_config().vocab_size
    return (torch.arange(context, device=model.device) % vocabulary)[None]


@contextmanager
def _forward_errors(model: LanguageModel, context: int) -> Iterator[None]:
    """Turns any error of a forward pass into a UserError: every replica would raise it too."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        raise UserError(
            f"model.name={model.name} ({type(model.model).__name__}) cannot run a sequence of "
            f"harvest.context={context} tokens ({said}); use a shorter context, or another model"
        ) from error
