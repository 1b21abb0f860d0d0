"""Which positions of its sequences a model reads in the present forward pass, also while it writes with a cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sae_dist.config import UserError
from sae_dist.model.families import decoder
from sae_dist.model.hooks import PreTrainedModel

# Position 0 is left alone: models use it as a place to attend to nothing, its activation is many times as long as all
# others, and a harvest leaves it out, so that no dictionary has seen one.
AFTER_FIRST = slice(1, None)

Positions = Callable[[], Int[Tensor, "batch context"]]


@contextmanager
def positions(model: PreTrainedModel) -> Iterator[Positions]:
    """A function that says the position of each token of the pass under way: 0 is a sequence's first, -1 is padding."""
    present: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        (batch, context), mask = tokens.shape[:2], kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            found = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)[:, -context:]
        else:
            cache = kwargs.get("past_key_values")
            before = 0 if cache is None else int(cache.get_seq_length())
            found = torch.arange(before, before + context, device=tokens.device).expand(batch, context)
        present[:] = [found]

    handle = decoder(model).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield lambda: present[0]
    finally:
        handle.remove()


def within(found: Int[Tensor, "batch context"], at: slice) -> Bool[Tensor, "batch context"]:
    """Whether each position is in the span."""
    chosen = found >= max(0, at.start or 0)
    return chosen if at.stop is None else chosen & (found < at.stop)


def check_span(at: slice) -> None:
    """UserError for a span that does not say from which position to which."""
    ends = [end for end in (at.start, at.stop) if end is not None]
    if at.step not in (None, 1) or any(end < 0 for end in ends) or (len(ends) == 2 and ends[0] >= ends[1]):
        raise UserError(
            f"at={at.start}:{at.stop}{'' if at.step is None else f':{at.step}'} is no span of positions; give the "
            "first and the one after the last, counted from 0 at the start of the text, without a step"
        )
