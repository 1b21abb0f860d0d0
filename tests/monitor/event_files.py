"""TensorBoard's event files, read back: records of a length, its checksum, a body and its checksum."""

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]


def events(path: Path) -> list[Any]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        assert len(body) == length, f"{path} ends within a record"
        found.append(Event.FromString(body))
        at += 16 + length
    return found


def scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every event of that tag, in the order of the file."""
    found = ((event.step, value) for event in events(path) for value in event.summary.value)
    return [(step, value.simple_value) for step, value in found if value.tag == tag]
