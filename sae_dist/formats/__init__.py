"""Dictionaries in the files of other tools: a module each format, behind `export` and `read`."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist.config import UserError, local_folder, to_dict
from sae_dist.formats.found import Told, dictionary
from sae_dist.formats.names import names_of, refuse_unused
from sae_dist.hub import address
from sae_dist.hub.pull import pull
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.find import FILES

__all__ = ["FORMATS", "OWN", "Format", "Told", "export", "on_disk", "read"]


class Format(NamedTuple):
    """A tool's files, with a module of this package of the same name: `read`, and `export` where it writes them too."""

    tool: str
    files: tuple[str, ...]  # their names, or patterns of them, in the folder of a dictionary
    exports: bool = True


OWN = "sae_dist"
FORMATS = {
    OWN: Format("sae_dist", FILES),
    "saelens": Format("SAELens", ("cfg.json", "sae_weights.safetensors")),
    "sparsify": Format("sparsify", ("cfg.json", "sae.safetensors")),
    "dictionary_learning": Format("dictionary_learning, SAEBench", ("config.json", "ae.pt")),
    "circuit_tracer": Format("circuit-tracer", ("config.yaml", "layer_*.safetensors", "W_*.safetensors")),
    "qwen_scope": Format("Qwen-Scope", ("layer*.sae.pt",)),
    "openai": Format("OpenAI", ("*.pt",)),
    "gemma_scope": Format("Gemma Scope", ("params.npz",), exports=False),
    "gemma_scope_2": Format("Gemma Scope 2", ("config.json", "params.safetensors"), exports=False),
    "llama_scope": Format("Llama Scope", ("hyperparams.json", "checkpoints/final.safetensors"), exports=False),
}


def on_disk(key: str, place: str, *, format: str) -> tuple[Path, dict[str, Any]]:
    """The files of a format at `place`, the value of a key: a path, or hf://, whose files are fetched.

    With them, what a dictionary that is made of them says of where they came from. UserError for any other URI. One in
    its own files says nothing: it stays the one that was pushed, bit by bit.
    """
    if not address.is_address(place):
        return Path(local_folder(key, place)), {}
    pulled = pull(address.parse(key, place), FORMATS[known(format)].files)
    return pulled.path, {} if format == OWN else {"from": str(pulled.address)}


def read(path: Path, *, format: str, told: Told) -> Dictionary:
    """The dictionary in another tool's file or folder; UserError where the file is damaged or does not say enough."""
    module = importlib.import_module(f"{__name__}.{known(format)}")
    if unused := [key for key, value in to_dict(told).items() if value is not None and key not in module.TOLD]:
        may = ", ".join(module.TOLD) or "nothing: its files say all"
        raise UserError(f"{unused[0]} means nothing to format={format}, which may be told {may}")
    if not path.exists():
        raise UserError(f"path={path} does not exist")
    found = module.read(path, told)
    return found if isinstance(found, Dictionary) else dictionary(found, told, path=path, format=format)


def export(
    own: Dictionary, to: Path, *, format: str, model_name: str | None = None, hook_name: str | None = None,
    hook_name_out: str | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the files of a tool into the folder `to`; UserError where the tool has no such dictionaries.

    The names are what the tool calls the model and the hook points, where these are not the usual ones; UserError for
    one that its files do not say.
    """
    if not FORMATS[known(format)].exports:
        can = ", ".join(name for name, each in FORMATS.items() if each.exports)
        raise UserError(f"format={format} is read only; those that are written: {can}")
    module = importlib.import_module(f"{__name__}.{format}")
    given = {"model_name": model_name, "hook_name": hook_name, "hook_name_out": hook_name_out}
    refuse_unused(given, module.NAMED, format=format)
    return module.export(own, to, names_of(own, **given))


def known(format: str) -> str:
    """`format` itself; UserError where there is none of that name."""
    if format not in FORMATS:
        raise UserError(f"format={format} is not known; choose one of {', '.join(FORMATS)}")
    return format
