"""What is known of a run's latents, in the files of tools that show them: a module each format, behind `export`."""

import importlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import UserError
from sae_dist.dashboards import delphi, neuronpedia_upload
from sae_dist.dashboards.latents import Latents
from sae_dist.dashboards.source import Source, source_of
from sae_dist.formats.names import refuse_unused
from sae_dist.interpret import read_labels
from sae_dist.run_files import read_yaml
from sae_dist.sae import dictionary
from sae_dist.sae.dictionary import Dictionary

FORMATS: Mapping[str, str] = {  # by name: the tool
    "saedashboard": "SAEDashboard", "neuronpedia": "Neuronpedia", "circuit_tracer_features": "circuit-tracer",
    "delphi": "delphi",
}  # fmt: skip


def export(
    run: Path, to: Path, *, format: str, model_name: str | None = None, set_name: str | None = None
) -> Generator[Path, None, None]:
    """Writes the files of a tool into the folder `to`, and yields each. Repeated after a stop it goes on.

    UserError where `run` has no feature data of its main dictionary (delphi: no held-out rows), or `to` holds other
    files of these names.
    """
    if format == "delphi":  # every activation, not what is known of latents
        refuse_unused({"model_name": model_name, "set_name": set_name}, (), format=format)
        yield from delphi.write(run, _dictionary(run), to, _config(run))
        return
    latents, source = _known(run, model_name, set_name)
    yield from importlib.import_module(f"{__name__}.{format}").write(latents, to, source)


def upload(run: Path, to: str) -> Iterator[int]:
    """Sends latents to neuronpedia://MODEL/SET, and yields how many each batch had. Repeated, it goes on."""
    latents, source = _known(run, *neuronpedia_upload.address_of(to))
    yield from neuronpedia_upload.upload(latents, source, run)


def _known(run: Path, model_name: str | None, set_name: str | None) -> tuple[Latents, Source]:
    own = _dictionary(run)
    latents = Latents(run, own)
    labelled = (run / read_labels.FOLDER / read_labels.SCORES).is_file()
    source = source_of(
        own, _config(run), rows=latents.features.rows, model_name=model_name, set_name=set_name,
        labelled_by=read_labels.labels(run).scores["by"] if labelled else None,
    )  # fmt: skip
    return latents, source


def _dictionary(run: Path) -> Dictionary:
    if not (run / "dictionary").is_dir():
        raise UserError(f"out={run} is no run's folder; what is shown is of latents of a run's main dictionary")
    return dictionary.load(run / "dictionary")


def _config(run: Path) -> dict[str, Any]:
    return read_yaml(run / "config.yaml", cure="give the folder of a run")
