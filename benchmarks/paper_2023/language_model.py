"""The subject: a transformer of one layer, residual stream 128, 512 ReLU neurons, as a folder like any other model's.

It never sees documents that `sae-dist` holds out, whatever share of them a harvest asks for up to `HELDOUT`.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_dist.text.document import split_key
from sae_dist.text.split import is_heldout

logger = logging.getLogger("paper-2023")
SEPARATOR = "<|endoftext|>"
CONTEXT, BATCH, CHUNK = 128, 32, 512  # tokens a sequence, sequences a step, tokens of the unembedding at once
HELDOUT = 0.1  # of the documents
SAVE_S, LR = 60.0, 3e-3


class Corpus(NamedTuple):
    """Tokens of all documents that are trained on, and of those held out, each beginning with the separator."""

    train: np.ndarray
    heldout: np.ndarray


def make_tokenizer(corpus: Path, vocab: int, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the corpus, saved in `folder`; that which is there, where there is one."""
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[SEPARATOR], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(_texts(corpus), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=CONTEXT
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokenise(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for texts in _batched(_texts(corpus), 1_000):
        for text, found in zip(texts, tokenizer.backend_tokenizer.encode_batch(texts), strict=True):
            sides[is_heldout(split_key(text), HELDOUT)].append(np.array([0, *found.ids], np.int32))
    return Corpus(*map(np.concatenate, sides))


def train(corpus: Corpus, vocab: int, tokens: int, seed: int, folder: Path) -> dict[str, float]:
    """Trains on so many tokens and saves the model in `folder`; goes on where it was stopped. Its figures."""
    done = folder / "training.json"
    if done.exists():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(_config(vocab))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    steps, first = max(tokens // (BATCH * CONTEXT), 1), 0
    half = folder / "half.pt"
    if half.exists():
        kept = torch.load(half, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        first = kept["step"]
    saved = time.monotonic()
    for step, batch in enumerate(_batches(corpus.train, steps, seed)):
        if step < first:
            continue
        for group in optimiser.param_groups:
            group["lr"] = LR * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if time.monotonic() - saved > SAVE_S:
            save(half, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1})
            logger.info("%s: step %d of %d, %.3f nats a token", folder.name, step + 1, steps, loss.item())
            saved = time.monotonic()
    model.save_pretrained(folder)
    found = {"seed": seed, "tokens": steps * BATCH * CONTEXT, "heldout_loss": _heldout_loss(model, corpus.heldout)}
    done.write_text(json.dumps(found))
    half.unlink(missing_ok=True)
    return found


def _config(vocab: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab, n_positions=CONTEXT, n_embd=128, n_layer=1, n_head=4, n_inner=512,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _batched(texts: Iterator[str], n: int) -> Iterator[list[str]]:
    while some := list(itertools.islice(texts, n)):
        yield some


def _batches(tokens: np.ndarray, steps: int, seed: int) -> Iterator[Int[Tensor, "batch context_1"]]:
    """Every sequence once in an order of its own in each epoch; a token more than the context, which is predicted."""
    chance = np.random.default_rng(seed)
    starts, at = np.arange(0, len(tokens) - CONTEXT - 1, CONTEXT), 0
    order = chance.permutation(starts)
    for _ in range(steps):
        if at + BATCH > len(order):
            order, at = chance.permutation(starts), 0
        places = order[at : at + BATCH, None] + np.arange(CONTEXT + 1)
        at += BATCH
        yield torch.from_numpy(tokens[places].astype(np.int64))


def _loss(model: GPT2LMHeadModel, batch: Int[Tensor, "batch context_1"]) -> Float[Tensor, ""]:
    hidden = model.transformer(batch[:, :-1]).last_hidden_state.flatten(0, 1)
    return CrossEntropy.apply(hidden, model.lm_head.weight, batch[:, 1:].flatten())


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ W.T, some tokens at a time; gradients are taken on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, targets: Tensor) -> Tensor:
        total, d_hidden, d_W = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(W)
        for first in range(0, len(hidden), CHUNK):
            some = slice(first, first + CHUNK)
            logits, own = hidden[some] @ W.t(), targets[some, None]
            total += (logits.logsumexp(1) - logits.gather(1, own)[:, 0]).sum()
            slope = logits.softmax(1)
            slope.scatter_add_(1, own, -torch.ones_like(own, dtype=slope.dtype))
            d_hidden[some] = slope @ W
            d_W.addmm_(slope.t(), hidden[some])
        ctx.save_for_backward(d_hidden.div_(len(hidden)), d_W.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        d_hidden, d_W = ctx.saved_tensors
        return d_hidden * upstream, d_W * upstream, None


@torch.no_grad()
def _heldout_loss(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    some = tokens[: min(len(tokens), 2_000 * CONTEXT) // CONTEXT * CONTEXT]
    batches = torch.from_numpy(some.astype(np.int64)).view(-1, CONTEXT).split(BATCH)
    losses = [float(_loss(model, batch)) * len(batch) for batch in batches]
    return sum(losses) / sum(map(len, batches))


def save(path: Path, kept: dict[str, Any]) -> None:
    torch.save(kept, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
