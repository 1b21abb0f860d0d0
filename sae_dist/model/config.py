"""Which language model; apart from load.py, which needs seconds to import what loads one."""

from typing import Literal

from sae_dist.config import frozen


@frozen
class ModelConfig:
    """Which language model, and how it is held.

    name: `smollm2`, `tiny-llama`, `tiny-gpt2`, a name on the Hugging Face hub, or a local folder
    revision: commit, tag or branch of a hub model; null is its default branch
    dtype: `auto` is bfloat16 where the device computes it fast, else float32
    device: `auto` is the GPU when there is one
    attention: `auto` is the architecture's default, mostly sdpa. On a CPU `eager` is faster up to about 200 tokens of
        context (SmolLM2 in bf16: 11 to 20 % of a harvest at 128) and slower beyond; both round bf16 equally well
    """

    name: str = "smollm2"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    trust_remote_code: Literal[False] = False
