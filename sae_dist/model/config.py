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
    attention: `auto` is the architecture's default, mostly sdpa. `eager` keeps [batch, heads, context, context]; on a
        CPU it may pay for small batches of short context (SmolLM2 in bf16, against sdpa: 10 % more tokens per
        CPU-second at 4 x 128, 12 % fewer at 16 x 128, half at a context of 1,024)
    """

    name: str = "smollm2"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    trust_remote_code: Literal[False] = False
