"""Make a dictionary of another tool's files, for evaluate, pages, steering and Python.

Formats: sae_dist (its own), saelens, sparsify, dictionary_learning, circuit_tracer, gemma_scope, gemma_scope_2,
llama_scope, qwen_scope, openai. What a file does not say has to be told. verify=STORE measures FVU and L0 on rows of a
store, and refuses figures that cannot be right. path=hf://OWNER/NAME/FOLDER is on the Hugging Face Hub.
Example: sae-dist import path=exported/mine format=saelens out=dictionaries/theirs
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist import formats
from sae_dist.config import UserError, frozen, load, local_folder
from sae_dist.formats import Told
from sae_dist.sae import dictionary
from sae_dist.service.verify_import import verify


@frozen
class ImportJob(Told):
    """Which files to read, what they do not say, and where the dictionary goes."""

    path: str  # the file or folder of one dictionary, on a disk or hf://OWNER/NAME[@REVISION][/FOLDER]
    format: str = (
        formats.OWN
    )  # sae_dist (its own), saelens, sparsify, dictionary_learning, circuit_tracer, gemma_scope, gemma_scope_2, ...
    out: str  # the dictionary's folder; one that holds another dictionary is not replaced
    verify: str | None = None  # a store of the same hook point, on whose rows FVU and L0 are measured


CONFIG = ImportJob


def main(values: Mapping[str, Any]) -> int:
    job = load(ImportJob, values)
    told = Told(**{field.name: getattr(job, field.name) for field in dataclasses.fields(Told)})  # type: ignore[arg-type]
    out = Path(local_folder("out", job.out))
    path, origin = formats.on_disk("path", job.path, format=job.format)
    found = formats.read(path, format=job.format, told=told)
    if job.verify is not None:
        figures = verify(found, job.verify)
        print(f"on {figures['tokens']} rows of {job.verify}: FVU {figures['fvu']:.4g}, L0 {figures['l0']:.4g}")
        origin |= {"verified": figures}
    if origin:
        imported = found.info.get("imported", {}) | origin
        found = dataclasses.replace(found, info={**found.info, "imported": imported})
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out} is not empty; give another folder")
    dictionary.save(found, out)
    print(out)
    return 0
