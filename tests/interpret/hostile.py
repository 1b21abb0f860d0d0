"""A small dictionary on a text that tries to act in the pages: as feature pages, and as feature data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_kernels import Active, Selected, packed
from sae_kernels.reference import EMPTY

from sae_dist.interpret.collect import PagesConfig
from sae_dist.interpret.features import write_features
from sae_dist.interpret.logit_effect import Unembedding
from sae_dist.interpret.site import feature_pages

HOSTILE = ["<script>alert(1)</script>", "</script>", "<!--", "\u2028", "\\", '"', "'", "`${1}", "]]>", "&lt;", "\u202e"]
PIECES: list[str | bytes] = [*HOSTILE, b"\xe3\x81", b"\x82", "\n", "\t", " the", "\udc80"]
N_LATENTS, D_MODEL, DOCS, CONTEXT, K = 70, 16, 30, 20, 4
CONFIG = PagesConfig(top_contexts=5, tokens_before=4, tokens_after=2, interval_contexts=1)
SUMMARY = {"name": "</script><script>alert(2)</script>", "eval": {"fvu": float("nan"), "loss_recovered": None}}


class Stream:
    context = CONTEXT
    tokens = torch.randint(0, len(PIECES), (DOCS, CONTEXT), generator=torch.Generator().manual_seed(0))

    def category(self, doc: int) -> str | None:
        return ("prose", "<script>")[doc % 2]

    def locate(self, doc: int, pos: int) -> tuple[int, int]:
        return doc, pos

    def window(self, doc: int, pos: int, before: int, after: int) -> tuple[list[int], int]:
        first = max(0, pos - before)
        return self.tokens[doc, first : pos + after + 1].tolist(), pos - first


def write(out: Path, decode: Callable = PIECES.__getitem__, n_latents: int = N_LATENTS, no_outputs: str = "") -> Path:
    """Feature pages."""
    return feature_pages(out, **_described(decode, n_latents, no_outputs))


def write_data(out: Path) -> Path:
    """Feature data of the same."""
    described = _described(PIECES.__getitem__, N_LATENTS, "")
    return write_features(out, **described, vocabulary=range(len(PIECES)), about={"weights": "these"})


def _described(decode: Callable, n_latents: int, no_outputs: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(DOCS * CONTEXT, D_MODEL, generator=g)
    W_dec = torch.randn(n_latents, D_MODEL, generator=g)
    at = torch.arange(DOCS * CONTEXT)

    def encode(x: torch.Tensor) -> Active:
        values, indices = (x @ W_dec.T).topk(K)
        return packed(Selected(values, torch.where(values > 0, indices, EMPTY)))

    return {
        "rows": lambda: iter([(x, at // CONTEXT, at % CONTEXT)]),
        "encode": encode,
        "W_dec": W_dec,
        "outputs": no_outputs or Unembedding(torch.randn(D_MODEL, len(PIECES), generator=g), torch.arange(len(PIECES))),
        "stream": Stream(),
        "decode": decode,
        "special": (15,),
        "summary": SUMMARY,
        "config": CONFIG,
    }
