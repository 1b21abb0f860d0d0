"""Object storage: a folder or S3 behind one small interface (interface.py)."""

import re
import uuid
from pathlib import Path

from sae_dist.config import UserError
from sae_dist.storage.interface import Bytes, Entry, ReadOnlyError, Storage, StorageError, Unavailable, checked_key
from sae_dist.storage.local import LocalStorage

__all__ = [
    "Bytes", "Entry", "LocalStorage", "ReadOnlyError", "Storage", "StorageError", "Unavailable",
    "check_conditional_create", "checked_key", "clock", "open",
]  # fmt: skip


def open(uri: str | Path, *, retry_s: float | None = None) -> Storage:
    """The storage at `uri`: a folder, file:///folder or s3://bucket/prefix.

    A request to S3 that fails is tried again for `retry_s` (None: S3Config.retry_s), then raises Unavailable. S3 finds
    endpoint, region and credentials where every AWS client does (AWS_ENDPOINT_URL, AWS_PROFILE, roles, ...).
    """
    scheme, separator, rest = str(uri).partition("://")
    if not separator:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", str(uri)):
            raise UserError(
                f"store={uri} is a mistyped URI: those begin with s3:// or file://; write ./{uri} for a "
                "folder of that name"
            )
        return LocalStorage(Path(uri).absolute())
    match scheme:
        case "file":
            return LocalStorage(Path(rest).absolute())
        case "s3":
            from sae_dist.storage.s3 import S3Config, S3Storage  # its clients take a second to import

            bucket, _, prefix = rest.strip("/").partition("/")
            return S3Storage(bucket, prefix, None if retry_s is None else S3Config(retry_s=retry_s))
        case _:
            raise UserError(f"store={uri}: unknown scheme {scheme}; use a folder, file:// or s3://")


def check_conditional_create(storage: Storage) -> None:
    """StorageError for a storage that would let two writers create the same key.

    Some S3 servers ignore If-None-Match and answer 200 to everybody (rclone 1.75, nanio 0.1 do).
    """
    key = f"probe/{uuid.uuid4().hex}"
    try:
        first, second = storage.create(key, b"first"), storage.create(key, b"second")
        kept = bytes(storage.read(key))
    finally:
        storage.delete(key)
    if not first or second or kept != b"first":
        raise StorageError(
            f"store={storage.uri}: a second conditional create of one key was accepted, so two producers could "
            "commit one unit; use a store that honours If-None-Match (AWS S3, R2, MinIO, SeaweedFS, a local folder)"
        )


def clock(storage: Storage) -> float:
    """The storage's own time in seconds since the epoch, which `Entry.mtime` goes by; this machine's may differ."""
    key = f"probe/{uuid.uuid4().hex}"
    try:
        storage.write(key, b"clock")
        return next(iter(storage.list(key))).mtime
    finally:
        storage.delete(key)
