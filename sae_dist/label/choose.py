"""The labeller and judge that a configuration asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sae_dist.label.answers import Answers
from sae_dist.label.config import LabelConfig
from sae_dist.label.interface import Judge, Labeller
from sae_dist.label.offline import Offline
from sae_dist.label.prompts import Asked, Speaker


class LabellerAndJudge(Labeller, Judge, Protocol):
    @property
    def identity(self) -> Any:
        """What its labels depend on beside evidence and configuration; JSON-ready."""
        ...


@contextmanager
def chosen(config: LabelConfig, answers: Path) -> Iterator[LabellerAndJudge]:
    """`answers` is the file that keeps what a language model has said; UserError where the labeller cannot be had."""
    if config.by == "offline":
        yield Offline()
        return
    speaker = _speaker(config)
    kept = Answers(answers)
    try:
        yield Asked(speaker, kept, max_tokens=config.max_tokens, per_question=config.per_question)
    finally:
        kept.close()


def _speaker(config: LabelConfig) -> Speaker:
    if config.by == "server":
        from sae_dist.label.server import Server

        return Server(config)
    from sae_dist.label.local_model import LocalModel  # transformers takes seconds to load

    return LocalModel(config.model)
