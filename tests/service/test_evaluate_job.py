"""Where a dictionary is judged in held-out text: where a harvest makes rows."""

import numpy as np
import pytest
import torch

from sae_dist.harvest.config import RowPolicy
from sae_dist.model import tiny
from sae_dist.service.evaluate_job import row_positions
from tests import conversations


@pytest.mark.parametrize("opens", ["", conversations.END])
@pytest.mark.parametrize("turns", ["assistant", "all"])
def test_the_tokens_that_end_turns_are_judged(opens, turns, tmp_path):
    tokenizer = tiny.tokenizer()
    stream = conversations.stream(tmp_path, tokenizer, opens=opens, turns=turns)
    found = stream.sequences(np.arange(stream.n_sequences))
    x = torch.ones(*found.tokens.shape, 4)
    kept = row_positions(RowPolicy(), tokenizer, stream)(torch.as_tensor(found.tokens), x).numpy() & found.counted
    assert np.array_equal(kept, conversations.rows(stream, tokenizer.decode, turns))
