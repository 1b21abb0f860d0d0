"""Random models of a few thousand weights, with a byte tokenizer: whole runs in seconds, without a download.

They are written as ordinary model folders and loaded like any other model.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sae_dist.config import digest
from sae_dist.model import model_cache

_SEPARATOR = "<|endoftext|>"
_D_MODEL, _N_HEADS, _CONTEXT, _VOCAB = 32, 4, 512, 257  # vocab: the bytes and the separator
_SPREAD = 0.2  # about 1 / sqrt(d_model): every layer moves the residual stream, and the logits are not flat


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, in the byte-level alphabet of GPT-2, and a separator that begins and ends documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(BPE({_SEPARATOR: 0} | {char: i for i, char in enumerate(alphabet, start=1)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token=_SEPARATOR, eos_token=_SEPARATOR, model_max_length=_CONTEXT
    )


def _llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=_D_MODEL,
        intermediate_size=3 * _D_MODEL,
        num_hidden_layers=4,
        num_attention_heads=_N_HEADS,
        num_key_value_heads=_N_HEADS // 2,
        max_position_embeddings=_CONTEXT,
        initializer_range=_SPREAD,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=_VOCAB,
        n_positions=_CONTEXT,
        n_embd=_D_MODEL,
        n_layer=3,
        n_head=_N_HEADS,
        initializer_range=_SPREAD,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


TINY: Mapping[str, Callable[[], PreTrainedModel]] = {"tiny-llama": _llama, "tiny-gpt2": _gpt2}


def model(name: str) -> PreTrainedModel:
    """The tiny model of that name; always the same weights, and the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TINY[name]()


def model_folder(name: str) -> Path:
    """The folder with the tiny model of that name in fp32 safetensors and its tokenizer, made on first use."""
    made_by = digest([transformers.__version__, torch.__version__, Path(__file__).read_text(encoding="utf-8")])
    return model_cache.cached_folder(f"{name}-{made_by[:12]}", partial(_write, name))


def _write(name: str, folder: Path) -> None:
    made = model(name)
    made.config.to_json_file(folder / "config.json")
    save_model(made, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
