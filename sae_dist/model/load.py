"""Load a language model by name: SmolLM2 from its package, a tiny random one, or any Hugging Face causal LM."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sae_dist.config import UserError
from sae_dist.model import smollm2, tiny
from sae_dist.model.config import ModelConfig

logger = logging.getLogger(__name__)

_SAMPLE = 4096  # weights of each tensor that the fingerprint reads


class Tokenizer(Protocol):
    """What the house uses of a tokenizer; transformers' own type says too little to be checked."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def decode(self, token_ids: list[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    def __call__(self, text: list[str], **options: bool) -> Mapping[str, list[list[int]]]: ...


class LanguageModel(NamedTuple):
    """A model in evaluation mode, without gradients, and what a store must record about it.

    revision: the commit that was loaded, where the model has one
    dtype: `float32` or `bfloat16`, after `auto` was decided
    fingerprint: changes when architecture, dtype or weights do (up to 4,096 of each tensor are read)
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    fingerprint: str


def load(config: ModelConfig) -> LanguageModel:
    """The language model that `config` names, ready for forward passes; raises `UserError` when it cannot be had."""
    began = time.monotonic()
    device = _device(config.device)
    dtype = fast_dtype(device) if config.dtype == "auto" else config.dtype
    with _no_progress_bars():
        model, tokenizer = _load(config, getattr(torch, dtype))
    if config.attention != "auto":
        model.set_attn_implementation(config.attention)
    model.requires_grad_(False).eval().to(device)  # type: ignore[arg-type]
    model.config.name_or_path = config.name  # what messages call it; for smollm2 it was the cache folder
    revision = config.revision if config.name in tiny.TINY else getattr(model.config, "_commit_hash", None)
    n_parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %.4g M parameters, %s on %s, %.1f s",
        config.name, n_parameters / 1e6, dtype, device, time.monotonic() - began,
    )  # fmt: skip
    return LanguageModel(model, cast(Tokenizer, tokenizer), config.name, revision, dtype, fingerprint(model))


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 if the device multiplies it in hardware: elsewhere it is slower than float32, not faster."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the architecture and of evenly spaced weights of every tensor; where it was loaded from is no part."""
    settings = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype")
    }
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        hashed.update(_sample(weight).cpu().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _SAMPLE) or 1].contiguous()


def _load(config: ModelConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.name in tiny.TINY:
        model = tiny.model(config.name)
        for weight in model.parameters():  # not model.to(dtype): rotary frequencies are buffers and stay in float32
            weight.data = weight.data.to(dtype)
        return model, tiny.tokenizer()
    if config.name == "smollm2":
        source = str(smollm2.checkpoint())
    elif Path(config.name).expanduser().is_dir():
        source = str(Path(config.name).expanduser())
    elif config.name.startswith(("/", "./", "../", "~")):
        raise UserError(f"model.name={config.name}: no such folder; give a folder with config.json and safetensors")
    else:
        source = config.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=config.revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:  # what transformers raises for names, files and architectures it cannot use
        revision = "" if config.revision is None else f" model.revision={config.revision}"
        raise UserError(
            f"model.name={config.name}{revision} cannot be loaded ({_first_line(error)}); check the name, or, if this "
            "machine is offline, give a local folder with config.json, a tokenizer and safetensors weights, or smollm2"
        ) from error
    return model, tokenizer


def _device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device=cuda, but this machine has no usable GPU; use model.device=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Replicas on many machines would each draw a bar into the log; what takes long is logged in lines."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
