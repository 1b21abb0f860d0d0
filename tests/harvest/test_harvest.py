"""A unit through a real (tiny) model."""

import numpy as np
import torch

from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvest import harvest
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.text.stream import Sequences
from sae_dist.text.tokenize import separator

MODEL = load(ModelConfig(name="tiny-llama", dtype="float32"))


def sequences(n: int = 6, context: int = 10) -> Sequences:
    tokens = np.random.default_rng(0).integers(3, 200, (n, context))
    tokens[2, 4] = separator(MODEL.tokenizer) or 0
    doc = np.repeat(np.arange(n, dtype=np.uint64)[:, None] + 2**63, context, 1)
    pos = np.tile(np.arange(context, dtype=np.uint32), (n, 1))
    return Sequences(tokens, doc, pos)


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
