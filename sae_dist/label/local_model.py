"""A local Hugging Face model as the one that is asked. It takes the likeliest tokens: equal prompts, equal answers."""

import logging
from typing import Any

import torch

from sae_dist.config import UserError
from sae_dist.label.prompts import Prompt
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load

logger = logging.getLogger(__name__)

DEFAULT = "smollm2"  # needs no network, and is far too small to label well


class LocalModel:
    """Prompts go through the tokenizer's chat template where it has one; else they are plain text to be continued."""

    at_once = 1

    def __init__(self, name: str | None) -> None:
        """UserError where the model cannot be loaded."""
        if name is None:
            logger.warning("label.model is not given: %s is asked, which is too small to label well", DEFAULT)
        self._model = load(ModelConfig(name=name or DEFAULT))
        self._tokenizer: Any = self._model.tokenizer  # its protocol does without chat templates
        settings = self._model.model.config.get_text_config()
        self._positions: int = getattr(settings, "max_position_embeddings", None) or 1 << 62

    @property
    def identity(self) -> list[Any]:
        return [self._model.name, self._model.revision, self._model.fingerprint]

    @torch.no_grad()
    def ask(self, prompt: Prompt) -> str:
        """The answer; UserError where prompt and answer are longer than the model's positions."""
        tokens = torch.tensor([self._tokens(prompt)], device=self._model.device)
        n = tokens.shape[1]
        if n + prompt.max_tokens > self._positions:
            raise UserError(
                f"label.model={self._model.name} has {self._positions} positions, and a prompt of {n} tokens leaves "
                f"no room for an answer of {prompt.max_tokens}; lower label.contexts, label.per_question or "
                "label.max_tokens, or take another model"
            )
        end, model = self._tokenizer.eos_token_id, self._model.model
        written: Any = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=prompt.max_tokens, do_sample=False,
            pad_token_id=0 if end is None else end,
        )  # fmt: skip
        new = written[0, n:].tolist()
        return self._tokenizer.decode(new[: new.index(end)] if end in new else new, skip_special_tokens=True)

    def stop(self) -> None:
        pass  # nothing waits

    def _tokens(self, prompt: Prompt) -> list[int]:
        """No text of the prompt becomes a special token, which could end a turn."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            return list(
                self._tokenizer([prompt.text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
            )
        text = prompt.text
        for special in self._tokenizer.all_special_tokens:
            text = text.replace(special, f"{special[:1]}\u200b{special[1:]}")
        said = [{"role": "user", "content": text}]
        text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer([text], add_special_tokens=False)["input_ids"][0])
