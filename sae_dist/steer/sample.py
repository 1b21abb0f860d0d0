"""Text that a model writes, and what it makes of it: the same seed, the same text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.model.load import LanguageModel
from sae_dist.model.logits import next_token_loss
from sae_dist.text.tokenize import encode

_BATCH = 8  # sequences a pass of the loss


class Sample(NamedTuple):
    text: str  # without the prompt
    surprise: float | None  # mean nats a new token to the model as it is now; None where it wrote nothing


def prompt_tokens(language_model: LanguageModel, prompt: str, separator: int | None) -> Int[Tensor, " n"]:
    """The prompt as a harvest tokenises a document: the separator, where there is one, and the text."""
    (ids,) = encode(language_model.tokenizer, [prompt])
    head = [] if separator is None else [separator]
    return torch.tensor([*head, *ids], dtype=torch.long, device=language_model.device)


def one_token(language_model: LanguageModel, text: str) -> int:
    """The token that `text` is; UserError where it is several."""
    (ids,) = encode(language_model.tokenizer, [text])
    if len(ids) != 1:
        pieces = " ".join(repr(language_model.tokenizer.decode([token])) for token in ids)
        raise UserError(
            f"logits: {text!r} is {len(ids)} tokens of {language_model.name} ({pieces or 'none'}); give one token, "
            "most words with the space before them"
        )
    return ids[0]


def write(
    language_model: LanguageModel, prompt: Int[Tensor, " n"], *, samples: int, max_tokens: int, temperature: float,
    seed: int,
) -> Int[Tensor, "samples length"]:  # fmt: skip
    """The prompt with `samples` continuations; they depend on the seed and not on what was drawn before."""
    model: Any = language_model.model  # transformers types its methods too loosely
    end = language_model.tokenizer.eos_token_id
    chance = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    batch = prompt.expand(samples, -1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=max_tokens, do_sample=temperature > 0,
            pad_token_id=0 if end is None else end, **chance,
        )  # fmt: skip


def read(language_model: LanguageModel, written: Int[Tensor, "samples length"], n_prompt: int) -> list[Sample]:
    """Each continuation up to its end, with its surprise to the model, which should have no clamp now."""
    end, found = language_model.tokenizer.eos_token_id, []
    losses = token_losses(language_model, written)[:, n_prompt - 1 :]
    for new, loss in zip(written[:, n_prompt:].tolist(), losses, strict=True):
        length = new.index(end) if end in new else len(new)
        text = language_model.tokenizer.decode(new[:length])
        found.append(Sample(text, float(loss[:length].mean()) if length else None))
    return found


@torch.no_grad()
def token_losses(
    language_model: LanguageModel, tokens: Int[Tensor, "sequences context"]
) -> Float[Tensor, "sequences next_position"]:
    """Cross-entropy in nats of each token after the first."""
    parts = [next_token_loss(language_model.model, part) for part in tokens.to(language_model.device).split(_BATCH)]
    return torch.cat(parts).float().cpu()


@torch.no_grad()
def next_logits(language_model: LanguageModel, prompt: Int[Tensor, " n"]) -> Float[Tensor, " vocab"]:
    """Logits of the token after the prompt."""
    return language_model.model(input_ids=prompt[None], use_cache=False).logits[0, -1].float().cpu()


def likely(language_model: LanguageModel, logits: Float[Tensor, " vocab"], n: int) -> Sequence[tuple[str, float]]:
    """The `n` most likely tokens with their probabilities."""
    top = logits.softmax(0).topk(n)
    return [
        (language_model.tokenizer.decode([token]), probability)
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
