"""Families that no table of the product knows, each for something that it does its own way; tiny and random."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": 0}
_GATED = {**_SIZES, "intermediate_size": 40, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": None}
OTHERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SIZES, intermediate_size=40),  # layers two modules deep; sees later tokens
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=4),
    "falcon": FalconConfig(**_SIZES),
    "lfm2": Lfm2Config(**_GATED),  # its final norm is called embedding_norm
    "llama4": Llama4TextConfig(**_GATED, head_dim=8, num_local_experts=2, intermediate_size_mlp=40),  # no get_decoder
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=3, state_size=4),  # no heads
    "mpt": MptConfig(vocab_size=61, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    "openai-gpt": OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=3, n_head=4),  # layers return lists; no final norm
}


def other(name: str) -> PreTrainedModel:
    """The model of that name; norms and biases random too: ones and zeros would hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[name]).eval().requires_grad_(False)
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model
