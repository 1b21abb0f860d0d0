"""The small JSON objects of a store: with a hash of their content, limited in size, checked field by field.

The hash detects accidental changes. It does not make the content valid, so every field is checked as well.
"""

import json
from typing import Annotated, Any, TypeVar

from pydantic import Field

from sae_dist import config
from sae_dist.config import UserError
from sae_dist.storage import Bytes, Storage

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
READ_TRIES = 3  # reads of bytes that do not match their checksum, before the store is reported as damaged
SMALL_BYTES = 1 << 20  # more than any record whose size does not grow with the store


class CorruptData(UserError):
    """Stored bytes that do not match their commit; the message names the unit to harvest again."""


def seal(record: dict[str, Any]) -> bytes:
    """`record` as JSON with the hash of its content under `digest`."""
    return json.dumps({**record, "digest": config.digest(record)}, separators=(",", ":")).encode()


def unseal(data: Bytes, what: str) -> dict[str, Any]:
    """The record in `data`, its own `digest` included; raises `CorruptData` when that is not the hash of the rest."""
    try:
        record = json.loads(bytes(data))
        digest = config.digest({k: v for k, v in record.items() if k != "digest"})
    except (ValueError, AttributeError, RecursionError):
        raise CorruptData(f"{what} is not the JSON record that was written there") from None
    if digest != record.get("digest"):
        raise CorruptData(f"{what} does not match its own digest")
    return record


def read(storage: Storage, key: str, what: str, *, most: int = SMALL_BYTES) -> dict[str, Any]:
    """The record at `key`, of at most `most` bytes; one that does not match its digest is read again.

    Fields are not checked; `checked` does that.
    """
    for _ in range(READ_TRIES - 1):
        try:
            return _read(storage, key, what, most)
        except CorruptData:
            continue
    return _read(storage, key, what, most)


def _read(storage: Storage, key: str, what: str, most: int) -> dict[str, Any]:
    data = storage.read(key, 0, most + 1)
    if len(data) > most:
        raise CorruptData(f"{what} is larger than the {most} bytes that such a record may have")
    return unseal(data, what)


def checked(cls: type[T], record: dict[str, Any], what: str) -> T:
    """`record` as a `cls`; CorruptData that names the field where it makes no sense."""
    try:
        return config.load(cls, record)
    except UserError as error:
        raise CorruptData(f"{what} makes no sense: {error}") from None
