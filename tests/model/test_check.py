"""What a model and its tokenizer cannot do is known before anything runs."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, WhisperConfig

from sae_dist.config import UserError
from sae_dist.model import tiny
from sae_dist.model.check import check_evaluation, check_forward, check_text
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import LanguageModel
from tests.model.families import other


def saved(folder: Path, config: PreTrainedConfig) -> ModelConfig:
    config.to_json_file(folder / "config.json")
    return ModelConfig(name=str(folder))


def held(name: str) -> LanguageModel:
    return LanguageModel(other(name), tiny.tokenizer(), name, None, "float32", "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPT2Config(n_positions=32, vocab_size=257), "harvest.context=64, but .* has 32 positions; use .*=32 or less"),
        (LlamaConfig(max_position_embeddings=63, vocab_size=257), "has 63 positions"),
        (LlamaConfig(vocab_size=200), "57 tokens beyond the 200 rows of the model's embedding, such as .* \\(200\\)"),
        (WhisperConfig(vocab_size=257), "is an encoder-decoder \\(whisper\\)"),
    ],
)
def test_text_that_the_model_has_no_place_for_is_refused(tmp_path, config, said):
    with pytest.raises(UserError, match=said):
        check_text(saved(tmp_path, config), tiny.tokenizer(), context=64, separator=0)  # type: ignore[arg-type]


def test_special_tokens_that_no_text_becomes_may_lie_beyond_the_embedding(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # number 257
    model = saved(tmp_path, LlamaConfig(vocab_size=257))
    check_text(model, tokenizer, context=64, separator=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 tokens beyond"):
        check_text(model, tokenizer, context=64, separator=257)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mamba", "llama4", "mpt", "openai-gpt"])
def test_causal_models_of_any_family_are_judged(name):
    check_forward(held(name), ["resid_post.1"], 16)
    check_evaluation(held(name), "resid_post.1", 16)


def test_a_model_that_sees_later_tokens_is_read_but_not_judged():
    check_forward(held("bert"), ["resid_post.1", "bert.encoder.layer.0.output"], 16)
    with pytest.raises(UserError, match="BertLMHeadModel.* is no causal language model"):
        check_evaluation(held("bert"), "resid_post.1", 16)


def test_what_a_forward_pass_raises_is_a_line():
    model = held("openai-gpt")
    model.model.get_submodule("transformer.positions_embed").weight = torch.nn.Parameter(torch.zeros(8, 32))
    with pytest.raises(UserError, match="cannot run a sequence of harvest.context=16 tokens \\(IndexError: "):
        check_forward(model, ["resid_post.1"], 16)
