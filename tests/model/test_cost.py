"""What a forward pass costs, against numbers worked out by hand."""

import pytest

from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load

LLAMA = load(ModelConfig(name="tiny-llama", dtype="float32"))
LAYER = (
    2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96) + 4 * 32 * 5
)  # matrices; attention over 5 of 9 positions on average


@pytest.mark.parametrize(
    ("hooks", "n_layers"),
    [
        (["resid_pre.0"], 0),
        (["model.embed_tokens"], 0),
        (["resid_pre.1"], 1),
        (["resid_post.1"], 2),
        (["resid_post.0", "mlp_act.2", "resid_pre.1"], 3),
        (["model.norm"], 4),
    ],
)
def test_operations_are_those_of_the_layers_that_run(hooks: list[str], n_layers: int):
    assert LLAMA.flop_per_token(hooks, context=9) == n_layers * LAYER


def test_a_token_takes_one_layer_and_what_is_captured():
    inside = 4 * (3 * 32 + 3 * 96) + 2 * 4 * 32
    assert LLAMA.bytes_per_token(["resid_post.1"], context=9) == inside + 4 * 32
    assert LLAMA.bytes_per_token(["resid_post.1", "mlp_act.0"], context=9) == inside + 4 * 32 + 4 * 96


def test_eager_attention_keeps_its_scores():
    eager = load(ModelConfig(name="tiny-llama", dtype="float32", attention="eager"))
    scores = (4 + 2 * 4) * 4 * 100
    assert eager.bytes_per_token(["resid_post.1"], 100) == LLAMA.bytes_per_token(["resid_post.1"], 100) + scores
