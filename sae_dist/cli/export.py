"""Write a run's dictionary as another tool's files, which give the same reconstruction there.

Formats: sae_dist (its own), saelens, sparsify, dictionary_learning, circuit_tracer, qwen_scope, openai. What `sae-dist
pages RUN data=true` and `label` found of its latents is written by saedashboard, neuronpedia and
circuit_tracer_features, their activations on held-out text by delphi. to=neuronpedia://MODEL/SET sends latents there.
to=hf://OWNER/NAME/FOLDER pushes them to the Hugging Face Hub, with a card of the run's figures and recipe. Repeated, it
sends what is not there yet. The token is that of `hf auth login` or HF_TOKEN.
Example: sae-dist export runs/mine format=saelens to=exported/mine
         sae-dist export runs/mine to=hf://me/my-dictionary license=mit
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist import dashboards, formats
from sae_dist.config import UserError, frozen, load, local_folder
from sae_dist.dashboards.neuronpedia_upload import SCHEME
from sae_dist.hub import address, push
from sae_dist.sae import dictionary
from sae_dist.sae.find import dictionary_folder
from sae_dist.service.push_dictionary import staged

POSITIONAL = ("out",)


@frozen
class ExportJob:
    """Which dictionary to write, and how."""

    out: str  # a run's folder, or a dictionary's own
    # sae_dist (as it is), saelens, sparsify, dictionary_learning, circuit_tracer, qwen_scope or openai; saedashboard,
    # neuronpedia or circuit_tracer_features: what is known of its latents; delphi: their activations
    format: str = formats.OWN
    # the folder to write into, where a file that is there and differs is not replaced; hf://OWNER/NAME[/FOLDER]; of
    # neuronpedia also neuronpedia://MODEL/SET
    to: str
    model_name: str | None = None  # what the tool calls the model; null: as the dictionary does
    hook_name: str | None = None  # what the tool calls the hook point; null: TransformerLens' name, or the module path
    hook_name_out: str | None = None  # of a transcoder: what it calls the hook point that is rebuilt
    set_name: str | None = None  # saedashboard, neuronpedia: of the sources; null: as res-16k
    private: bool = True  # hf://: a new repository is for its owner only, and a public one is refused
    license: str | None = None  # hf://: of the dictionary, as the Hub names it: apache-2.0, mit, cc-by-4.0
    card: bool = True  # hf://: write README.md; false leaves the one that is there
    dry_run: bool = False  # hf://: print the card and the files that would be sent


CONFIG = ExportJob


def main(values: Mapping[str, Any]) -> int:
    job = load(ExportJob, values)
    if job.format in dashboards.FORMATS:
        return _show(job)
    if job.set_name is not None:
        raise UserError(f"set_name={job.set_name} means nothing to format={job.format}; leave it out")
    names = {"model_name": job.model_name, "hook_name": job.hook_name, "hook_name_out": job.hook_name_out}
    with dictionary_folder(local_folder("out", job.out)) as folder:
        if address.is_address(job.to):
            return _push(job, folder, names)
        if job.license is not None or job.dry_run or not (job.private and job.card):
            raise UserError(
                f"private, license, card and dry_run are for to=hf://OWNER/NAME, not for a folder, {job.to}"
            )
        to = Path(local_folder("to", job.to))
        for path in formats.export(dictionary.load(folder), to, format=job.format, **names):
            print(path)
    return 0


def _show(job: ExportJob) -> int:
    used = ("out", "format", "to", "model_name", "set_name")
    others = [field for field in dataclasses.fields(ExportJob) if field.name not in used]  # type: ignore[arg-type]
    if given := [field.name for field in others if getattr(job, field.name) != field.default]:
        raise UserError(f"{given[0]} means nothing to format={job.format}; leave it out")
    run = Path(local_folder("out", job.out))
    if job.format == "neuronpedia" and job.to.startswith(SCHEME):
        named = {"model_name": job.model_name, "set_name": job.set_name}
        if told := [f"{key}={value}" for key, value in named.items() if value]:
            raise UserError(f"{told[0]} is said by to={job.to} already; leave it out")
        print(f"{sum(dashboards.upload(run, job.to)):,} latents sent to {job.to}")
        return 0
    to = Path(local_folder("to", job.to))
    written = dashboards.export(run, to, format=job.format, model_name=job.model_name, set_name=job.set_name)
    print(f"{sum(1 for _ in written):,} files in {to}")
    return 0


def _push(job: ExportJob, folder: Path, names: Mapping[str, str | None]) -> int:
    to = address.parse("to", job.to)
    with staged(folder, to, format=job.format, license=job.license, card_too=job.card, **names) as sent:
        if job.dry_run:
            print(sent.card)
        for name, path in sent.files.items():
            print(f"{name}  {path.stat().st_size:,} bytes")
        if job.dry_run:
            for key, path in sent.paths.items():
                print(f"config.json says a path of this machine: {key}={path}")
            print(f"nothing is sent to {to}: dry_run=true")
            return 0
        pushed = push.push(to, sent.files, private=job.private, front=sent.front)
    print(f"{pushed.url}  {'private' if pushed.private else 'public'}, commit {pushed.commit}")
    return 0
