"""A randomly initialised model of every family that the hook points name."""

import functools

import pytest
import torch
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
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
_GPT_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2, **_SPECIAL}
_EXPERTS = {**_GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT_ATTENTION = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
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
    "gpt2": GPT2Config(**_GPT_SIZES),
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=40),
    "gpt_neox sequential": GPTNeoXConfig(**_SIZES, intermediate_size=40, use_parallel_residual=False),
    "phi": PhiConfig(**_SIZES, intermediate_size=40),
    "apertus": ApertusConfig(**_GATED),
    "cohere": CohereConfig(**_GATED),
    "cohere2": Cohere2Config(**_GATED),
    "ernie4_5": Ernie4_5Config(**_GATED, head_dim=8),
    "exaone4": Exaone4Config(**_GATED),
    "glm": GlmConfig(**_GATED, head_dim=8),
    "glm4": Glm4Config(**_GATED, head_dim=8),
    "helium": HeliumConfig(**_GATED, head_dim=8),
    "nemotron": NemotronConfig(**_GATED),
    "olmo": OlmoConfig(**_GATED),
    "olmo3": Olmo3Config(**_GATED),
    "seed_oss": SeedOssConfig(**_GATED, head_dim=8),
    "smollm3": SmolLM3Config(**_GATED),
    "stablelm": StableLmConfig(**_GATED),
    "stablelm parallel": StableLmConfig(**_GATED, use_parallel_residual=True),
    "starcoder2": Starcoder2Config(**_GATED),
    "persimmon": PersimmonConfig(**_SIZES, intermediate_size=40),
    "gptj": GPTJConfig(**_GPT_SIZES, rotary_dim=4),
    "codegen": CodeGenConfig(**_GPT_SIZES, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=3, num_heads=4, initializer_range=0.2, **_SPECIAL,
        attention_types=[[["global", "local", "global"], 1]],
    ),
    "mixtral": MixtralConfig(**_EXPERTS, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**_EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
    "qwen3_moe": Qwen3MoeConfig(**_EXPERTS | {"head_dim": 8}, num_experts=4),
    "olmoe": OlmoeConfig(**_EXPERTS, num_experts=4),
    "gpt_oss": GptOssConfig(**_GATED | {"head_dim": 8}, num_experts_per_tok=2, num_local_experts=4),
    "deepseek_v3": DeepseekV3Config(
        **_EXPERTS | _LATENT_ATTENTION, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=40, init_std=0.2,
        word_embed_proj_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ),
}  # fmt: skip


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="session", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def family(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model a family."""
    return random_model(request.param)


@pytest.fixture(scope="session", params=[name for name in CONFIGS if name not in MIXTURES])
def dense_family(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One of those whose MLP is one, not a mixture of experts."""
    return random_model(request.param)


@functools.cache
def random_model(name: str) -> PreTrainedModel:
    """Every weight is random (norms and biases too: ones and zeros would hide mistakes)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
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
