"""A randomly initialised model of every family that the hook points name."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from sae_dist.model.config import ModelConfig
from sae_dist.model.load import LanguageModel, load

VOCAB = 61
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    **_SPECIAL,
}
_GATED = {**_SIZES, "intermediate_size": 40, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**_GATED),
    "mistral": MistralConfig(**_GATED, head_dim=8),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=8),
    "phi3": Phi3Config(**_GATED),
    "gemma": GemmaConfig(**_GATED, head_dim=8),
    "gemma2": Gemma2Config(**_GATED, head_dim=8, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**_GATED, head_dim=8),
    "olmo2": Olmo2Config(**_GATED),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, **_SPECIAL),
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=40),
    "gpt_neox sequential": GPTNeoXConfig(**_SIZES, intermediate_size=40, use_parallel_residual=False),
    "phi": PhiConfig(**_SIZES, intermediate_size=40),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=40, init_std=0.2,
        word_embed_proj_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ),
}  # fmt: skip


@pytest.fixture(scope="session", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def family(request: pytest.FixtureRequest):
    """One model a family, every weight random (norms and biases too: ones and zeros would hide mistakes)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().requires_grad_(False)
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(2, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_llama() -> LanguageModel:
    return load(ModelConfig(name="tiny-llama", dtype="float32"))


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The real model; converted here if no test or run did so before."""
    return load(ModelConfig(name="smollm2", dtype="bfloat16", device="cpu"))
