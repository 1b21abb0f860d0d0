"""A unit through a real (tiny) model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.harvest.config import HarvestConfig, RowPolicy
from sae_dist.harvest.forward import batch_sequences
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.text.stream import Sequences
from sae_dist.text.tokenize import separator
from tests import conversations
from tests.harvest.one_unit import harvest

MODEL = load(ModelConfig(name="tiny-llama", dtype="float32"))


def sequences(n: int = 6, context: int = 10) -> Sequences:
    tokens = np.random.default_rng(0).integers(3, 200, (n, context))
    tokens[2, 4] = separator(MODEL.tokenizer) or 0
    doc = np.repeat(np.arange(n, dtype=np.uint64)[:, None] + 2**63, context, 1)
    pos = np.tile(np.arange(context, dtype=np.uint32), (n, 1))
    return Sequences(tokens, doc, pos, np.ones_like(tokens, dtype=bool))


def test_rows_are_the_hidden_states_of_the_kept_positions_with_their_origin():
    given, config = sequences(), HarvestConfig(context=10, batch_sequences=4)
    rows = harvest(MODEL, ["resid_post.1", "resid_pre.0"], sequences=given, config=config)
    with torch.no_grad():
        hidden = MODEL.model(torch.as_tensor(given.tokens), output_hidden_states=True).hidden_states
    kept = [(s, p) for s in range(6) for p in range(1, 10) if (s, p) != (2, 4)]
    assert torch.allclose(rows.states["resid_post.1"], torch.stack([hidden[2][s, p] for s, p in kept]), atol=1e-6)
    assert torch.allclose(rows.states["resid_pre.0"], torch.stack([hidden[0][s, p] for s, p in kept]), atol=1e-6)
    assert rows.doc.tolist() == [2**63 + s for s, _ in kept]
    assert rows.pos.tolist() == [p for _, p in kept]
    assert rows.token.tolist() == [int(given.tokens[s, p]) for s, p in kept]
    assert (rows.positions, rows.nonfinite, rows.outliers) == (60, 0, 0)


def test_of_conversations_only_the_tokens_that_count_are_rows():
    given = sequences()
    given.counted[:, ::2] = False
    rows = harvest(MODEL, ["resid_post.1"], sequences=given, config=HarvestConfig(context=10))
    assert rows.pos.tolist() == 6 * [1, 3, 5, 7, 9] and rows.positions == 60
    given.counted[:] = False
    with pytest.raises(UserError, match="none of the assistant's tokens"):
        harvest(MODEL, ["resid_post.1"], sequences=given, config=HarvestConfig(context=10))


@pytest.mark.parametrize("opens", ["", conversations.END])
@pytest.mark.parametrize("turns", ["assistant", "all"])
def test_a_separator_that_ends_a_turn_is_a_row_and_one_that_opens_a_conversation_is_none(opens, turns, tmp_path):
    stream = conversations.stream(tmp_path, MODEL.tokenizer, opens=opens, turns=turns)
    given = stream.sequences(np.arange(stream.n_sequences))
    config = HarvestConfig(context=conversations.CONTEXT, rows=RowPolicy(max_norm_ratio=None))
    rows = harvest(MODEL, ["resid_post.1"], sequences=given, config=config)
    expected = conversations.rows(stream, MODEL.tokenizer.decode, turns)
    assert (given.tokens[expected] == separator(MODEL.tokenizer)).any()
    assert rows.token.tolist() == given.tokens[expected].tolist()
    assert rows.pos.tolist() == given.pos[expected].tolist()


def broken(spoil: Callable[[Tensor], None]) -> Any:
    """The model with `spoil` done to the activations of each batch."""

    def capture(tokens: Tensor, hooks: list[str]) -> dict[str, Tensor]:
        states = {hook: x.clone() for hook, x in MODEL.capture(tokens, hooks).items()}
        for x in states.values():
            spoil(x)
        return states

    return SimpleNamespace(
        name="broken", dtype="float32", tokenizer=MODEL.tokenizer, device=MODEL.device, capture=capture,
        bytes_per_token=MODEL.bytes_per_token,
    )  # fmt: skip


def test_nan_inf_and_huge_rows_are_dropped_and_counted():
    def spoil(x: Tensor) -> None:
        x[0, 3, 5] = float("nan")
        x[1, 2] = float("-inf")
        x[2, 7] *= 1000

    config = HarvestConfig(context=10, batch_sequences=6, max_nonfinite_fraction=0.05)
    rows = harvest(broken(spoil), ["resid_post.1"], sequences=sequences(), config=config)
    assert (rows.nonfinite, rows.outliers) == (2, 1)
    lost = {(0, 3), (1, 2), (2, 7), (2, 4)}
    kept = [(s, p) for s in range(6) for p in range(1, 10) if (s, p) not in lost]
    assert [(int(d - np.uint64(2**63)), int(p)) for d, p in zip(rows.doc, rows.pos, strict=True)] == kept
    assert rows.states["resid_post.1"].isfinite().all()


def test_too_many_of_them_stop_the_harvest_with_the_cure():
    config = HarvestConfig(context=10, batch_sequences=6)

    def nan(x: Tensor) -> None:
        x[0, 3, 5] = float("nan")

    with pytest.raises(UserError, match=r"1 of 53 positions of broken.*max_nonfinite_fraction=0.01.*float32"):
        harvest(broken(nan), ["resid_post.1"], sequences=sequences(), config=config)

    def huge(x: Tensor) -> None:
        x[:3, 5] *= 1000

    with pytest.raises(UserError, match=r"3 of 53 positions of broken.*max_outlier_fraction=0.05"):
        harvest(broken(huge), ["resid_post.1"], sequences=sequences(), config=config)


def test_a_unit_of_separators_alone_is_said():
    given = sequences()._replace(tokens=np.full((6, 10), separator(MODEL.tokenizer)))
    with pytest.raises(UserError, match="none of 60 positions becomes a row.*separators"):
        harvest(MODEL, ["resid_post.1"], sequences=given, config=HarvestConfig(context=10))


def test_every_position_that_is_run_is_text_whatever_the_batches():
    """Documents lie end to end in full sequences: short ones are packed, and no padding is ever computed."""
    run: list[Tensor] = []

    def capture(tokens: Tensor, hooks: list[str]) -> dict[str, Tensor]:
        run.append(tokens)
        return MODEL.capture(tokens, hooks)

    engine: Any = broken(lambda _: None)
    engine.capture = capture
    given = sequences()
    expected = harvest(MODEL, ["resid_post.1"], sequences=given, config=HarvestConfig(context=10, batch_sequences=6))
    for batch in (1, 4):
        run.clear()
        config = HarvestConfig(context=10, batch_sequences=batch)
        rows = harvest(engine, ["resid_post.1"], sequences=given, config=config)
        assert torch.cat(run).tolist() == given.tokens.tolist()
        assert rows.doc.tolist() == expected.doc.tolist()  # the same rows, within rounding
        assert torch.allclose(rows.states["resid_post.1"], expected.states["resid_post.1"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "gb", "expected"),
    [
        ("cuda", 2.0, 64),  # 2e9 bytes / (1e5 a token x 128) = 156 sequences: the whole unit
        ("cuda", 0.4, 22),  # 31 sequences fit: three batches, made equal
        ("cuda", 1e-6, 1),
        ("cpu", 2.0, 16),  # 2,048 tokens, what fits the caches
    ],
)
def test_the_batch_is_as_large_as_memory_allows_and_the_same_every_time(device: str, gb: float, expected: int):
    engine: Any = SimpleNamespace(device=torch.device(device), bytes_per_token=lambda *_: 100_000)
    config = HarvestConfig(context=128, unit_sequences=64, batch_memory_gb=gb)
    assert batch_sequences(engine, ["resid_post.1"], config) == expected
    assert batch_sequences(engine, ["resid_post.1"], HarvestConfig(batch_sequences=5)) == 5
