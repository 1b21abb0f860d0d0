"""Dictionaries in the files of other tools: a module each format, behind `export` and `read`."""

import importlib
from pathlib import Path
from typing import NamedTuple

from sae_dist.config import UserError, to_dict
from sae_dist.formats.found import Told, dictionary
from sae_dist.formats.names import names_of
from sae_dist.sae.dictionary import Dictionary

__all__ = ["FORMATS", "Format", "Told", "export", "read"]


class Format(NamedTuple):
    """A tool's files, with a module of this package of the same name: `read`, and `export` where it writes them too."""

    about: str
    exports: bool


FORMATS = {
    "saelens": Format("SAELens: cfg.json and sae_weights.safetensors", exports=True),
    "sparsify": Format("sparsify: cfg.json and sae.safetensors", exports=True),
    "dictionary_learning": Format("dictionary_learning, SAEBench: ae.pt and config.json", exports=True),
    "circuit_tracer": Format("circuit-tracer: layer_L.safetensors and config.yaml", exports=True),
    "qwen_scope": Format("Qwen-Scope: layerN.sae.pt", exports=True),
    "openai": Format("OpenAI: one .pt", exports=True),
    "gemma_scope": Format("Gemma Scope: params.npz", exports=False),
    "gemma_scope_2": Format("Gemma Scope 2: config.json and params.safetensors", exports=False),
    "llama_scope": Format("Llama Scope: hyperparams.json and checkpoints/final.safetensors", exports=False),
}


def read(path: Path, *, format: str, told: Told) -> Dictionary:
    """The dictionary in another tool's file or folder; UserError where the file is damaged or does not say enough."""
    module = importlib.import_module(f"{__name__}.{_known(format)}")
    if unused := [key for key, value in to_dict(told).items() if value is not None and key not in module.TOLD]:
        raise UserError(f"{unused[0]} means nothing to format={format}, which may be told {', '.join(module.TOLD)}")
    if not path.exists():
        raise UserError(f"path={path} does not exist")
    return dictionary(module.read(path, told), told, path=path, format=format)


def export(
    own: Dictionary, to: Path, *, format: str, model_name: str | None = None, hook_name: str | None = None,
    hook_name_out: str | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the files of a tool into the folder `to`; UserError where the tool has no such dictionaries.

    The names are what the tool calls the model and the hook points, where these are not the usual ones.
    """
    if not FORMATS[_known(format)].exports:
        can = ", ".join(name for name, each in FORMATS.items() if each.exports)
        raise UserError(f"format={format} is read only; those that are written: {can}")
    module = importlib.import_module(f"{__name__}.{format}")
    return module.export(
        own, to, names_of(own, model_name=model_name, hook_name=hook_name, hook_name_out=hook_name_out)
    )


def _known(format: str) -> str:
    if format not in FORMATS:
        raise UserError(f"format={format} is not known; choose one of {', '.join(FORMATS)}")
    return format
