"""botocore's sessions with a shared description of S3, and its errors as codes and words."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import botocore.exceptions
import botocore.loaders
from aiobotocore.session import AioSession


@functools.cache
def models() -> botocore.loaders.Loader:
    """The description of S3 that botocore reads from files, cached: parsing it costs 0.2 s of CPU a client."""
    return botocore.loaders.create_loader(os.environ.get("AWS_DATA_PATH"))


def session() -> AioSession:
    """A new session; it looks up its credentials once."""
    made = AioSession()
    made.register_component("data_loader", models())
    return made


def _response(error: botocore.exceptions.ClientError) -> Mapping[str, Any]:
    return error.response


def code(error: botocore.exceptions.ClientError) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def status(error: botocore.exceptions.ClientError) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def describe(error: Exception) -> str:
    if isinstance(error, botocore.exceptions.ClientError):
        return f"{status(error)} {code(error)}"
    return f"{type(error).__name__}: {error}".rstrip(": ")
