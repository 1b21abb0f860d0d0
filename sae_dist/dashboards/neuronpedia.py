"""Neuronpedia's bulk layout: MODEL/LAYER-SET/ with JSON lines of the model, the set, latents, contexts and labels."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_dist.dashboards.latents import Latent, Latents, bins, columns
from sae_dist.dashboards.source import Source
from sae_dist.formats.files import write_new

BATCH = 1024  # latents a file


def write(latents: Latents, to: Path, source: Source) -> Iterator[Path]:
    """Files that are complete are kept, so that the command goes on after a stop."""
    folder, named = to / source.model / source.name, {"modelId": source.model, "layer": source.name}
    for number, (fired, _) in enumerate(latents.batches(BATCH)):
        for kind, rows in (
            ("features", ({**named, **_feature(each, source)} for each in fired)),
            ("activations", ({**named, **row} for each in fired for row in _activations(each, source))),
            ("explanations", ({**named, **row} for each in fired for row in _explanations(each, source))),
        ):
            yield write_new(folder / kind / f"batch-{number}.jsonl.gz", gzip.compress(_lines(rows), mtime=0))
    for kind, row in _about(source).items():
        yield write_new(folder / f"{kind}.jsonl", _lines([row]))


def _about(source: Source) -> dict[str, dict[str, Any]]:
    return {
        "model": {"id": source.model, "displayName": source.model},
        "release": {"name": source.set_name, "description": source.description},
        "sourceset": {"modelId": source.model, "name": source.set_name, "description": source.description,
                      "releaseName": source.set_name, "hasDashboards": True},
        "source": {"id": source.name, "modelId": source.model, "setName": source.set_name, "hasDashboards": True,
                   "num_prompts": source.prompts, "num_tokens_in_prompt": source.context, "dataset": source.text},
    }  # fmt: skip


def _feature(latent: Latent, source: Source) -> dict[str, Any]:
    return {
        "index": str(latent.number), "sourceSetName": source.set_name, "maxActApprox": latent.maximum,
        "hasVector": True, "vector": latent.vector, "hookName": source.hook, **columns(latent),
    }  # fmt: skip


def _activations(latent: Latent, source: Source) -> Iterator[dict[str, Any]]:
    for number, context in enumerate(latent.contexts):
        peak = max(range(len(context.values)), key=context.values.__getitem__)
        low, high, share = bins(latent, context)
        yield {
            "id": _id(source, latent, number), "index": str(latent.number), "tokens": context.tokens,
            "values": context.values, "maxValue": context.values[peak], "maxValueTokenIndex": peak,
            "minValue": min(context.values), "binMin": low, "binMax": high, "binContains": share,
            "qualifyingTokenIndex": context.at, "dataIndex": None, "dataSource": source.text,
        }  # fmt: skip


def _explanations(latent: Latent, source: Source) -> Iterator[dict[str, Any]]:
    if latent.label is not None:
        yield {"id": _id(source, latent, -1), "index": str(latent.number), "description": latent.label,
               "typeName": source.labelled_by}  # fmt: skip


def _id(source: Source, latent: Latent, number: int) -> str:
    """The same whenever it is written again, so that a second import does not double the rows."""
    return hashlib.sha256(f"{source.model} {source.name} {latent.number} {number}".encode()).hexdigest()[:25]


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
