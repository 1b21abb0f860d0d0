"""Places for stores: a folder, the memory of this process, an S3 server that misbehaves, a real S3 server."""

import uuid

import pytest

from sae_dist import storage
from tests.memory_storage import MemoryStorage
from tests.shards import seaweedfs
from tests.shards.s3_double import S3Double


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """The endpoint of a real S3 server with a bucket named bucket."""
    with seaweedfs.server(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        seaweedfs.make_bucket(endpoint)
        yield endpoint


@pytest.fixture
def double(monkeypatch):
    """The misbehaving S3 server; clients in this process and its children find it."""
    with S3Double() as server:
        _point_to(server.endpoint, monkeypatch)
        yield server


def _point_to(endpoint: str, monkeypatch) -> None:
    for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


def open_place(kind: str, request, tmp_path):
    """An empty storage of one kind."""
    match kind:
        case "file":
            return storage.open(tmp_path / "store")
        case "memory":
            return MemoryStorage(uuid.uuid4().hex)
        case "double":
            request.getfixturevalue("double")
        case "seaweedfs":
            _point_to(request.getfixturevalue("seaweed"), request.getfixturevalue("monkeypatch"))
    return storage.open(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture(params=["file", "memory", "double"])
def place(request, tmp_path):
    """An empty storage."""
    return open_place(request.param, request, tmp_path)


@pytest.fixture(params=["file", "memory", "double", "seaweedfs"])
def every_place(request, tmp_path):
    """An empty storage, the real S3 server among them."""
    return open_place(request.param, request, tmp_path)


@pytest.fixture(params=["file", "double", "seaweedfs"])
def durable(request, tmp_path):
    """An empty storage that other processes can open by its URI."""
    return open_place(request.param, request, tmp_path)
