"""The configuration of the language model; apart from load.py, which takes seconds to import."""

import dataclasses
from pathlib import Path
from typing import Literal

from sae_dist.config import frozen

OURS = ("smollm2", "tiny-llama", "tiny-gpt2")  # names that are neither a folder nor on the hub


@frozen
class ModelConfig:
    """Which language model, and how it is held.

    name: `smollm2`, `tiny-llama`, `tiny-gpt2`, a name on the Hugging Face hub, or a local folder
    revision: commit, tag or branch of a hub model; null is its default branch
    dtype: `auto` is bfloat16 where the device computes it fast, else float32
    device: `auto` is the GPU when there is one
    attention: `auto` is the architecture's default, mostly sdpa. `eager` keeps [batch, heads, context, context]; on a
        CPU it may pay for small batches of short context (SmolLM2 in bf16, against sdpa: 10 % more tokens per
        CPU-second at 4 x 128, 12 % fewer at 16 x 128, half at a context of 1,024)
    engine: `hf` runs Hugging Face transformers; `vllm` runs vLLM, where it is installed: the residual stream only
    device_map: `none` puts the whole model on one device; the others lay its layers over the GPUs of this machine, one
        after the other (Hugging Face's names), for a model that does not fit one and is not tensor-parallel
    quantization: `none`, or weights in 8 or 4 bits by bitsandbytes, where it is installed: less memory, other values
    """

    name: str
    revision: str | None = None  # commit, tag or branch on the hub; null: its default branch
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 where the device computes it fast, else float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # the GPU when there is one
    attention: Literal["auto", "sdpa", "eager"] = "auto"  # the architecture's own, mostly sdpa
    engine: Literal["hf", "vllm"] = "hf"  # or vllm, where it is installed: residual stream only
    # auto, balanced, sequential: layers over the GPUs of a machine
    device_map: Literal["none", "auto", "balanced", "balanced_low_0", "sequential"] = "none"
    quantization: Literal["none", "int8", "nf4"] = "none"  # int8 or nf4 by bitsandbytes, where it is installed
    trust_remote_code: Literal[False] = False  # only false: code that comes with a model is never run

    def with_absolute_paths(self) -> "ModelConfig":
        """The same with the absolute path of a folder, for processes with other working directories.

        Links and `..` are resolved, because the store's description contains the name of the model.
        """
        folder = Path(self.name).expanduser()
        if self.name in OURS or not folder.is_dir():
            return self
        return dataclasses.replace(self, name=str(folder.resolve()))
