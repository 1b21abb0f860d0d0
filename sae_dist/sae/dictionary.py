"""A finished dictionary on raw activations, and its folder: dictionary.safetensors and config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sae_kernels
import torch
from jaxtyping import Float
from sae_kernels.reference import Selected
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.sae.initialize import Parameters

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """x_hat = decode(encode(x)) on raw activations; `info` is config.json: variant, model, hook point, provenance."""

    parameters: Parameters
    k: int
    info: Mapping[str, Any]

    @property
    def n_latents(self) -> int:
        return self.parameters.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        return self.parameters.W_dec.shape[1]

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Selected:
        """The active latents of every row, largest first."""
        W_enc, _, b_enc, b_dec = self.parameters
        return sae_kernels.topk_encode(x.float(), W_enc, b_enc, b_dec, k=self.k)

    def decode(self, selected: Selected) -> Float[Tensor, "batch d_model"]:
        """x_hat from the active latents."""
        _, W_dec, _, b_dec = self.parameters
        return sae_kernels.sparse_decode(selected.values, selected.indices, W_dec, b_dec)


def save(dictionary: Dictionary, folder: Path) -> None:
    """Writes both files, each whole or not at all; config.json last, so that a folder with one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / "dictionary.safetensors", folder / "config.json"
    tensors = {name: tensor.float().contiguous() for name, tensor in dictionary.parameters._asdict().items()}
    save_file(tensors, weights.with_suffix(".part"), metadata={"format": str(FORMAT)})
    weights.with_suffix(".part").replace(weights)
    info = {**dictionary.info, "format": FORMAT, "k": dictionary.k}
    config.with_suffix(".part").write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")
    config.with_suffix(".part").replace(config)


def load(folder: Path) -> Dictionary:
    """The dictionary in `folder`; raises UserError when it is missing, torn or of another format."""
    config, weights = folder / "config.json", folder / "dictionary.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise UserError(f"dictionary={folder} has no {path.name}; give the dictionary/ folder of a finished run")
    info = json.loads(config.read_text())
    if info.get("format") != FORMAT:
        raise UserError(f"dictionary={folder} is of format {info.get('format')}, this program reads {FORMAT}")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise UserError(
            f"{weights} is damaged ({error}); remove dictionary/ and summary.json and repeat the run's command"
        ) from error
    W_enc = tensors["W_enc"].T.contiguous().T
    parameters = Parameters(W_enc, tensors["W_dec"], tensors["b_enc"], tensors["b_dec"])
    if W_enc.shape != parameters.W_dec.T.shape:
        raise UserError(f"{weights}: W_enc {list(W_enc.shape)} does not fit W_dec {list(parameters.W_dec.shape)}")
    assert all(t.dtype == torch.float32 for t in parameters)
    return Dictionary(parameters=parameters, k=info["k"], info=info)
