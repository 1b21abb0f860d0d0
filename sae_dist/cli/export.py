"""Write a run's dictionary as another tool's files, which give the same reconstruction there.

Formats: saelens, sparsify, dictionary_learning, circuit_tracer, qwen_scope, openai.
Example: sae-dist export runs/mine format=saelens to=exported/mine
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist import formats
from sae_dist.config import frozen, load, local_folder
from sae_dist.sae import dictionary
from sae_dist.sae.find import dictionary_folder

POSITIONAL = ("out",)


@frozen
class ExportJob:
    """Which dictionary to write, and how."""

    out: str  # a run's folder, or a dictionary's own
    format: str  # saelens, sparsify, dictionary_learning, circuit_tracer, qwen_scope or openai
    to: str  # the folder to write into; a file that is there and differs is not replaced
    model_name: str | None = None  # what the tool calls the model; null: as the dictionary does
    hook_name: str | None = None  # what the tool calls the hook point; null: TransformerLens' name, or the module path
    hook_name_out: str | None = None  # of a transcoder: what it calls the hook point that is rebuilt


CONFIG = ExportJob


def main(values: Mapping[str, Any]) -> int:
    job = load(ExportJob, values)
    to = Path(local_folder("to", job.to))
    with dictionary_folder(local_folder("out", job.out)) as folder:
        own = dictionary.load(folder)
    written = formats.export(
        own, to, format=job.format, model_name=job.model_name, hook_name=job.hook_name,
        hook_name_out=job.hook_name_out,
    )  # fmt: skip
    for path in written:
        print(path)
    return 0
