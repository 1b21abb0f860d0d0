"""W&B's own run files, read back: the LevelDB log that wandb-core writes, its records parsed by wandb's protobufs.

wandb 0.31 has no reader in Python any more (wandb.sdk.internal.datastore is gone); the format is the same.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

HEADER, BLOCK = struct.pack("<4sHB", b":W&B", 0xBEE1, 0), 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Kept(NamedTuple):
    """What one .wandb file says of its run."""

    id: str
    name: str
    group: str
    job_type: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    alerts: list[tuple[str, str]]
    artifacts: list[Any]  # ArtifactRecord


def kept(path: Path) -> Kept:
    """Everything in a .wandb file that a test asks for; an AssertionError where its checksums are wrong."""
    run, config, summary = None, dict[str, Any](), dict[str, Any]()
    history, alerts, artifacts = [], [], []
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            case "history":
                history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
            case "summary":
                summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
            case "alert":
                alerts.append((record.alert.title, record.alert.text))
            case "artifact":
                artifacts.append(record.artifact)
            case "request" if record.request.WhichOneof("request_type") == "log_artifact":
                artifacts.append(record.request.log_artifact.artifact)
    assert run is not None, f"{path} names no run"
    return Kept(run.run_id, run.display_name, run.run_group, run.job_type, config, history, summary, alerts, artifacts)


def records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:6] == HEADER[:6], f"{path} is no file of W&B"
    at, parts = len(HEADER), b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header: padding
            at += BLOCK - at % BLOCK
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, at)
        body = data[at + 7 : at + 7 + length]
        if kind == 0 or len(body) < length:
            return
        assert zlib.crc32(bytes([kind]) + body) == crc, f"{path}: a record at {at} is damaged"
        at, parts = at + 7 + length, body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
