"""The vLLM engine: hidden states as vLLM's `extract_hidden_states` gives them, where the package vllm is installed.

**It has not run where this was written**: vLLM wants a GPU, and its interface moves from release to release (this is
that of 0.18 to 0.27). What is tested is this file against a stand-in for that interface.

Limits: the residual stream only (`resid_pre.L`, `resid_post.L`); no pipeline of layers; the whole model runs, there is
no stopping at the last hook point; the states pass through a file a sequence, which lies in shared memory. Prefix
caching and chunked prefill must be off: with either, vLLM can give fewer states than there are tokens (vLLM issue
44485), so their number and the tokens themselves are compared for every sequence.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from sae_dist.config import UserError
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import Tokenizer, fast_dtype, source

_RESIDUAL = re.compile(r"resid_(pre|post)\.(\d+)")
_SAMPLE = 4096  # weights of each tensor that the fingerprint reads


class Output(Protocol):
    """What vLLM returns for a prompt, as far as it is used here."""

    @property
    def kv_transfer_params(self) -> Mapping[str, Any]: ...


class Server(Protocol):
    """`vllm.LLM`, as far as it is used here."""

    def generate(self, prompts: Sequence[Mapping[str, Sequence[int]]], **options: Any) -> Sequence[Output]: ...


Start = Callable[..., tuple[Server, Any]]  # keyword arguments of vllm.LLM -> it, and sampling parameters for one token


class VllmEngine:
    """An engine on vLLM; it starts at the first `capture`, whose hook points it then gives for good."""

    def __init__(self, config: ModelConfig, start: Start | None = None) -> None:
        if start is None and importlib.util.find_spec("vllm") is None:
            raise UserError(
                "model.engine=vllm needs the package vllm, which is not installed; run: pip install vllm (on a machine "
                "with a GPU), or use model.engine=hf"
            )
        if config.device_map != "none" or config.quantization != "none" or config.attention != "auto":
            raise UserError(
                "model.engine=vllm decides about devices and attention itself; leave model.device_map, "
                "model.quantization and model.attention at their defaults, or use model.engine=hf"
            )
        self._start: Start = start or _start
        self._files = _files(config)
        self._architecture = AutoConfig.from_pretrained(self._files).get_text_config()
        self._tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(self._files))
        self._name, self._revision = config.name, config.revision
        self.device = torch.device("cpu")  # states come back through files
        gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype: Literal["float32", "bfloat16"] = fast_dtype(gpu) if config.dtype == "auto" else config.dtype
        self._fingerprint = _fingerprint(self._files, self._dtype)
        self._layers: tuple[int, ...] = ()
        self._server: Server | None = None
        self._sampling: Any = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def revision(self) -> str | None:
        return self._revision

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def width(self, hook: str) -> int:
        self._layer(hook)
        return int(self._architecture.hidden_size)

    def capture(
        self, tokens: Int[Tensor, "batch context"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch context width"]]:
        layers = tuple(sorted({self._layer(hook) for hook in hooks}))
        if self._server is None:
            self._launch(layers, context=tokens.shape[1])
        if not set(layers) <= set(self._layers):
            raise UserError(
                f"vLLM was started for layers {self._layers} and cannot give {layers}; ask for all at first"
            )
        assert self._server is not None
        prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
        outputs = self._server.generate(prompts, sampling_params=self._sampling, use_tqdm=False)
        states = torch.stack([self._read(out, row) for out, row in zip(outputs, tokens, strict=True)])
        return {hook: states[:, :, self._layers.index(self._layer(hook))].contiguous() for hook in dict.fromkeys(hooks)}

    def flop_per_token(self, hooks: Sequence[str], context: int) -> float:  # noqa: ARG002  the seam's signature
        """All layers run, whatever is asked for: 2 for every weight of a Llama-like layer, and causal attention."""
        config = self._architecture
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        attention = config.hidden_size * head_dim * (2 * heads + 2 * kv_heads)
        mlp = 3 * config.hidden_size * getattr(config, "intermediate_size", 4 * config.hidden_size)
        return config.num_hidden_layers * (2.0 * (attention + mlp) + 4 * heads * head_dim * (context + 1) / 2)

    def bytes_per_token(self, hooks: Sequence[str], context: int) -> int:  # noqa: ARG002  the seam's signature
        """In this process: the states of one token, as they are read and as they are returned. vLLM minds its own."""
        return 2 * len(hooks) * int(self._architecture.hidden_size) * 2

    def _layer(self, hook: str) -> int:
        """vLLM's number of the hook point: i is the input of layer i, so the last layer's output is n_layers."""
        named, n_layers = _RESIDUAL.fullmatch(hook), int(self._architecture.num_hidden_layers)
        if named is None or int(named[2]) >= n_layers:
            raise UserError(
                f"hook={hook} with model.engine=vllm: it gives resid_pre.L and resid_post.L with L from 0 to "
                f"{n_layers - 1}; use model.engine=hf for anything else"
            )
        return int(named[2]) + (named[1] == "post")

    def _launch(self, layers: tuple[int, ...], *, context: int) -> None:
        shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
        folder = tempfile.mkdtemp(prefix="sae_dist-vllm-", dir=shared)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._layers = layers
        self._server, self._sampling = self._start(
            model=self._files,
            dtype=self._dtype,
            tensor_parallel_size=max(torch.cuda.device_count(), 1),
            max_model_len=context + 1,  # the one token that vLLM insists on generating
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
            },
            kv_transfer_config={
                "kv_connector": "ExampleHiddenStatesConnector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": folder},
            },
        )

    def _read(self, output: Output, tokens: Int[Tensor, " context"]) -> Float[Tensor, "context layers width"]:
        path = Path(output.kv_transfer_params["hidden_states_path"])
        with safe_open(path, framework="pt") as file:
            states, seen = file.get_tensor("hidden_states"), file.get_tensor("token_ids")
        path.unlink()
        if len(states) != len(tokens) or not torch.equal(seen.long().cpu(), tokens.long().cpu()):
            raise RuntimeError(
                f"vLLM gave {len(states)} states for {len(tokens)} tokens, or those of other tokens: it must run "
                "without prefix caching and chunked prefill"
            )
        return states


def _start(**options: Any) -> tuple[Server, Any]:
    from vllm import LLM, SamplingParams  # pyright: ignore

    return LLM(**options), SamplingParams(max_tokens=1, temperature=0.0)


def _files(config: ModelConfig) -> str:
    """The folder with the model's files, fetched where the name is one on the hub."""
    if Path(folder := source(config)).is_dir():
        return folder
    try:
        return snapshot_download(
            config.name, revision=config.revision, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.name={config.name} cannot be fetched ({str(error).strip().splitlines()[0]}); check the name, or, "
            "if this machine is offline, give a local folder with config.json, a tokenizer and safetensors weights"
        ) from error


def _fingerprint(folder: str, dtype: str) -> str:
    """SHA-256 of the architecture, the engine, and the first weights of every tensor in the files."""
    settings = json.loads((Path(folder) / "config.json").read_text())
    told = {k: v for k, v in settings.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}
    hashed = hashlib.sha256(json.dumps(["vllm", dtype, told], sort_keys=True).encode())
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):  # noqa: SIM118  a file of safetensors is no mapping
                part = file.get_slice(name)
                shape = part.get_shape()
                rows = max(1, _SAMPLE // max(1, int(torch.Size(shape[1:]).numel()))) if shape else 0
                sample = part[:rows] if shape else file.get_tensor(name)
                hashed.update(f"{name} {part.get_dtype()} {tuple(shape)}".encode())
                hashed.update(sample.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
