"""circuit-tracer (0.5): features/layer_L.bin and features/index.json.gz, which its page of a graph reads by bytes.

A latent is its length in 4 bytes, little-endian, and zlib of JSON; index.json.gz has for each layer the file's name and
where each latent begins. A folder takes the layers of several runs, one after the other.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from sae_dist.config import UserError
from sae_dist.dashboards.latents import Context, Latent, Latents
from sae_dist.dashboards.source import Source
from sae_dist.formats.files import replace_whole, write_new
from sae_dist.run_files import parse_json

BATCH = 1024  # latents that are in memory at once, beside their bytes
INDEX = "index.json.gz"


def write(latents: Latents, to: Path, source: Source) -> Iterator[Path]:
    """Two files for the layer of `source`; the index keeps the layers that it has."""
    folder, records = to / "features", dict[int, bytes]()
    index = _read_index(folder / INDEX)
    for fired, silent in latents.batches(BATCH):
        records |= {latent.number: _record(_described(latent, source)) for latent in fired}
        records |= {number: _record(_silent(number, source)) for number in silent}
    parts = [records[number] for number in range(len(records))]
    path = write_new(folder / f"layer_{source.layer}.bin", b"".join(parts))
    yield path
    index += [{"filename": "", "offsets": []} for _ in range(source.layer + 1 - len(index))]
    index[source.layer] = {"filename": path.name, "offsets": list(accumulate(map(len, parts), initial=0))}
    replace_whole(folder / INDEX, gzip.compress(json.dumps(index).encode(), mtime=0))
    yield folder / INDEX


def _read_index(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        raise UserError(f"{path} is damaged; remove it, and export the runs of all layers again") from None
    return parse_json(text, list[dict[str, Any]], name=str(path), cure="remove it, and export all layers again")


def _record(described: dict[str, Any]) -> bytes:
    data = zlib.compress(json.dumps(described).encode())
    return len(data).to_bytes(4, "little") + data


def _silent(number: int, source: Source) -> dict[str, Any]:
    return {
        "transcoder_id": source.name, "index": number, "examples_quantiles": [], "top_logits": [], "bottom_logits": [],
        "act_min": 0.0, "act_max": 0.0, "quantile_values": [], "histogram": [], "activation_frequency": 0.0,
    }  # fmt: skip


def _described(latent: Latent, source: Source) -> dict[str, Any]:
    groups = dict[tuple[float, float, float] | None, list[Context]]()
    for context in latent.contexts:
        groups.setdefault(context.interval, []).append(context)
    return _silent(latent.number, source) | {
        "examples_quantiles": [
            {"quantile_name": _title(interval), "examples": [_example(context) for context in contexts]}
            for interval, contexts in groups.items()
        ],
        "top_logits": [text for text, _ in latent.promoted], "bottom_logits": [text for text, _ in latent.suppressed],
        "act_max": latent.maximum, "quantile_values": sorted({interval[0] for interval in groups if interval}),
        "histogram": [float(count) for count in latent.histogram[1]], "activation_frequency": latent.density,
    }  # fmt: skip


def _title(interval: tuple[float, float, float] | None) -> str:
    return "Strongest" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}, {interval[2]:.1%} of firings"


def _example(context: Context) -> dict[str, Any]:
    return {"tokens": context.tokens, "tokens_acts_list": context.values, "train_token_ind": context.at,
            "is_repeated_datapoint": False}  # fmt: skip
