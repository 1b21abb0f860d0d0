"""Load a language model by name: SmolLM2 from its package, a tiny random one, or any Hugging Face causal LM."""

import hashlib
import importlib.util
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sae_dist.config import UserError
from sae_dist.model import cost, parallel, smollm2, tiny
from sae_dist.model import hooks as hook_points
from sae_dist.model.config import ModelConfig
from sae_dist.model.parallel import ONE_PROCESS, ReplicaGroup

logger = logging.getLogger(__name__)

# What transformers raises for files and settings that it cannot use has no class in common.
_REFUSALS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip
_SAMPLE = 4096  # weights of each tensor that the fingerprint reads


class Tokenizer(Protocol):
    """The methods of a tokenizer that are used here; transformers' own type is too loose for type checks."""

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
    """A model in evaluation mode, without gradients, and what a store records about it.

    revision: the commit that was loaded, if the model has one
    dtype: `float32` or `bfloat16`, after `auto` was resolved
    fingerprint: changes when architecture, dtype or weights do (up to 4,096 of each tensor are read); it does not
        depend on how the model is distributed
    group: the processes that hold the model together
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    fingerprint: str
    group: ReplicaGroup = ONE_PROCESS

    @property
    def device(self) -> torch.device:
        return self.model.device

    def width(self, hook: str) -> int:
        """The size of the hook point's last dim."""
        return hook_points.width(self.model, hook, group=self.group)

    def capture(
        self, tokens: Int[Tensor, "batch context"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch context width"]]:
        """The activations at `hooks`, from one forward pass that ends at the last of them."""
        return hook_points.capture(self.model, tokens, hooks, group=self.group)

    def flop_per_token(self, hooks: Sequence[str], context: int) -> float:
        return cost.flop_per_token(self.model, hooks, context)

    def bytes_per_token(self, hooks: Sequence[str], context: int) -> int:
        return cost.bytes_per_token(self.model, hooks, context)


def load(config: ModelConfig, group: ReplicaGroup = ONE_PROCESS) -> LanguageModel:
    """Loads the language model of `config`; UserError when it cannot be loaded.

    In a `group` of several processes, all call this and each reads only its slices.
    """
    began = time.monotonic()
    device = chosen_device(config.device)
    dtype = fast_dtype(device) if config.dtype == "auto" else config.dtype
    with _no_progress_bars(), _load_errors(config), torch.random.fork_rng(devices=[]):
        model, tokenizer = _from_pretrained(config, getattr(torch, dtype), group), _tokenizer(config)
    if config.attention != "auto":
        model.set_attn_implementation(config.attention)
    model.requires_grad_(False).eval()
    if config.device_map == "none" and config.quantization == "none" and group.size == 1:
        model.to(device)  # type: ignore[arg-type]
    model.config.name_or_path = config.name  # what messages call it; for smollm2 it was the cache folder
    revision = getattr(model.config, "_commit_hash", None)
    logger.info(
        "%s: %.4g M parameters, %s on %s, %.4g MB in process %d of %d, %.1f s",
        config.name, sum(p.numel() for p in model.parameters()) / 1e6, dtype, device,
        parallel.held_bytes(model) / 1e6, group.rank, group.size, time.monotonic() - began,
    )  # fmt: skip
    return LanguageModel(model, cast(Tokenizer, tokenizer), config.name, revision, dtype, fingerprint(model), group)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """Loads the tokenizer of the model of `config`, without the model; UserError when it cannot be loaded."""
    with _load_errors(config):
        return cast(Tokenizer, _tokenizer(config))


def architecture(config: ModelConfig) -> PreTrainedConfig:
    """The configuration of the model of `config`, without its weights; UserError as in `load`."""
    with _load_errors(config):
        return AutoConfig.from_pretrained(source(config), revision=config.revision, trust_remote_code=False)


def source(config: ModelConfig) -> str:
    """The model's name for transformers: a folder or a name on the hub; UserError for a missing folder."""
    if config.name == "smollm2":
        return str(smollm2.model_folder())
    if config.name in tiny.TINY:
        return str(tiny.model_folder(config.name))
    if Path(config.name).expanduser().is_dir():
        return str(Path(config.name).expanduser())
    if config.name.startswith(("/", "./", "../", "~")):
        raise UserError(f"model.name={config.name}: no such folder; give a folder with config.json and safetensors")
    return config.name


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 if the device multiplies it in hardware, else float32, which is faster there."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the architecture and of evenly spaced weights of every tensor, wherever it was loaded from."""
    settings = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype", "distributed_config")
    }
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        weight = parallel.whole(weight)  # one at a time: no process holds more than its slices and one tensor
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        hashed.update(_sample(weight).cpu().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _SAMPLE) or 1].contiguous()


def _tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source(config), revision=config.revision, trust_remote_code=False)


@contextmanager
def _load_errors(config: ModelConfig) -> Iterator[None]:
    """Turns transformers' errors about names, files and architectures into a UserError with the cure.

    A RuntimeError is not caught: it may come from the process group of a replica.
    """
    revision = "" if config.revision is None else f" model.revision={config.revision}"
    try:
        yield
    except UserError:
        raise
    except _REFUSALS as error:
        raise UserError(
            f"model.name={config.name}{revision} cannot be loaded ({_one_line(error)}); check the name. If this "
            "machine is offline, give a local folder with config.json, a tokenizer and safetensors weights, or "
            "smollm2; if the files are there, they may be damaged: fetch them again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"model.name={config.name}{revision} does not fit the memory of its device; use model.dtype=bfloat16, "
            "model.device_map=auto, model.quantization or harvest.tensor_parallel, or model.device=cpu"
        ) from error


def _from_pretrained(config: ModelConfig, dtype: torch.dtype, group: ReplicaGroup) -> PreTrainedModel:
    """Loads the model: whole, this process's slices, spread over this machine's devices, or quantised."""
    options: dict[str, Any] = {}
    if group.size > 1:
        if config.device_map != "none" or config.quantization != "none":
            raise UserError(
                f"harvest.tensor_parallel={group.size} does not go with model.device_map={config.device_map} and "
                f"model.quantization={config.quantization}; leave both at none, or use harvest.tensor_parallel=1"
            )
        settings = architecture(config)
        options["distributed_config"] = parallel.sharding(settings, group.size)
        if parallel.undivided_heads(settings, group.size) and group.leads:
            logger.warning(
                "%s: its heads do not divide over harvest.tensor_parallel=%d, so that each process has attention whole "
                "and a share of the MLP; sizes that divide them: %s",
                config.name, group.size, parallel.dividing(settings),
            )  # fmt: skip
    if config.device_map != "none":
        options["device_map"] = config.device_map
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config, dtype)
        options.setdefault("device_map", {"": chosen_device(config.device)})
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source(config), revision=config.revision, dtype=dtype, use_safetensors=True, trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    model, found = loaded
    _refuse_random_weights(config, type(model).__name__, found)
    return model


def _refuse_random_weights(config: ModelConfig, kind: str, found: Mapping[str, Any]) -> None:
    """UserError when weights are missing from the files, which transformers would initialise at random."""
    missing = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"model.name={config.name}: its files lack {', '.join(missing[:3])}{more} of {kind}, or have them in "
            "another shape, and these weights would be random; fetch the files again, or save the model as a causal "
            "language model with all its weights"
        )


def _quantization(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={config.quantization} needs the package bitsandbytes, which is not installed; "
            "run: pip install bitsandbytes, or use model.quantization=none"
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def chosen_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of `model.device`; `auto` is the GPU when there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device=cuda, but this machine has no usable GPU; use model.device=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _one_line(error: Exception) -> str:
    """The first line of an error, with its type where the message alone says nothing (KeyError: 'weight_map')."""
    said = str(error).strip().split("\n")
    first = " ".join(line.strip() for line in said[: 2 if said[0].endswith(":") else 1]).rstrip(".")
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Turns off transformers' progress bars, which every replica would draw into the log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
