"""The files of a dictionary as a run leaves them: config.json and dictionary.safetensors, with hashes of both."""

import tempfile
from pathlib import Path

from sae_dist.formats.files import write_new
from sae_dist.formats.found import Told
from sae_dist.formats.names import Names
from sae_dist.sae import dictionary as own
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.find import FILES

TOLD = ()
NAMED = ()


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:  # noqa: ARG001
    """Both files in `to`, config.json last."""
    with tempfile.TemporaryDirectory(prefix="sae_dist_") as folder:
        own.save(dictionary, Path(folder))
        return [write_new(to / name, Path(folder, name).read_bytes()) for name in reversed(FILES)]


def read(path: Path, told: Told) -> Dictionary:  # noqa: ARG001
    return own.load(path / "dictionary" if (path / "dictionary").is_dir() else path)
