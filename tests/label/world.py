"""Feature data of planted latents: one token each, one category, and tokens by chance."""

from pathlib import Path

import torch
from sae_kernels import Active, Selected, packed
from sae_kernels.reference import EMPTY

from sae_dist.interpret.collect import PagesConfig
from sae_dist.interpret.features import write_features

DOCS, CONTEXT, VOCAB, K = 400, 20, 60, 3
N_TOKENS, CATEGORY, DEAD, N_LATENTS = 10, 10, 11, 36  # latents 0 to 9: tokens of these numbers
BY_CHANCE = tuple(range(12, N_LATENTS))
ROWS = DOCS * CONTEXT
CONFIG = PagesConfig(top_contexts=12, interval_contexts=3, tokens_before=8, tokens_after=4, logits=4)
G = torch.Generator().manual_seed(0)
DOC, POS = torch.arange(ROWS) // CONTEXT, torch.arange(ROWS) % CONTEXT
VERSE = DOC % 10 == 0
TOKENS = torch.where(
    VERSE, torch.randint(N_TOKENS, VOCAB, (ROWS,), generator=G), torch.randint(0, VOCAB, (ROWS,), generator=G)
)


def _activations() -> torch.Tensor:
    """Those of latents that fire by chance are on other tokens than the planted ones."""
    strength = torch.rand(ROWS, N_LATENTS, generator=G) + 0.1
    fires = torch.zeros(ROWS, N_LATENTS, dtype=torch.bool)
    fires[:, :N_TOKENS] = TOKENS[:, None] == torch.arange(N_TOKENS)
    fires[:, CATEGORY] = VERSE
    by_chance = torch.rand(ROWS, len(BY_CHANCE), generator=G) < 0.02
    fires[:, BY_CHANCE[0] :] = by_chance & (TOKENS >= N_TOKENS)[:, None]
    return strength * fires


ACTIVATIONS = _activations()


class Stream:
    context = CONTEXT

    def category(self, doc: int) -> str:
        return "verse" if doc % 10 == 0 else ("law", "news")[doc % 2]

    def locate(self, doc: int, pos: int) -> tuple[int, int]:
        return doc, pos

    def window(self, doc: int, pos: int, before: int, after: int) -> tuple[list[int], int]:
        first = max(0, pos - before)
        return TOKENS[doc * CONTEXT + first : doc * CONTEXT + min(CONTEXT, pos + after + 1)].tolist(), pos - first


def _encode(x: torch.Tensor) -> Active:
    values, indices = ACTIVATIONS[x[:, 0].long()].topk(6)
    return packed(Selected(values, torch.where(values > 0, indices, EMPTY)))


def write(run: Path) -> Path:
    """A run's folder with features/ alone."""
    write_features(
        run, lambda: [(torch.arange(ROWS).float()[:, None], DOC, POS)], encode=_encode,
        W_dec=torch.zeros(N_LATENTS, 4), outputs="made up", stream=Stream(), decode=lambda token: f" T{token}",
        vocabulary=range(VOCAB), about={}, config=CONFIG,
    )  # fmt: skip
    return run
