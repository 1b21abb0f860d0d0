"""An S3 bucket as storage: s3fs brings credentials, session and event loop; requests go through its client.

Every request is retried here and nowhere else (botocore's own retries are off): a body cut in half, a reset, a 503 or a
lost answer costs that one request again, after a random pause that doubles, until `retry_s` is used up.
"""

import asyncio
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import aiohttp
import botocore.exceptions
import botocore.parsers
import s3fs
from fsspec.asyn import sync
from pydantic import Field

from sae_dist import faults
from sae_dist.config import UserError, frozen
from sae_dist.storage import aws
from sae_dist.storage.interface import Bytes, Entry, ReadOnlyError, StorageError, Unavailable, checked_key

logger = logging.getLogger(__name__)
T = TypeVar("T")

NETWORK_ERRORS = (  # no answer or part of one; the request may or may not have been carried out
    asyncio.TimeoutError,
    ConnectionError,
    aiohttp.ClientError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ConnectionError,
    botocore.parsers.ResponseParserError,
)
CREDENTIAL_ERRORS = (  # the service that gives credentials did not answer; a role gets new ones every hour or so
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.MetadataRetrievalError,
)
TRANSIENT = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"}
TRANSIENT |= {
    "TooManyRequestsException",
    "ConditionalRequestConflict",
    "OperationAborted",
    "BadDigest",
    "IncompleteBody",
}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
FIRST_BYTES = 1 << 20  # of an object of unknown size: most are records of some kilobytes
UPLOAD_MARK = "#upload="  # key#upload=id names an upload that was begun and neither completed nor aborted


@frozen
class S3Config:
    """Sizes, retries and timeouts; endpoint and credentials come from the environment, as for every AWS client."""

    part_bytes: int = Field(default=16 << 20, ge=5 << 20)  # of one range read and of one part of an upload
    connections: int = Field(default=16, ge=1)  # AWS gives about 90 MB/s a connection
    retry_s: float = Field(default=120.0, ge=0)  # after the first failure of a request
    pause_s: float = Field(default=0.1, gt=0)  # the first pause is at most this; each further one at most twice as long
    longest_pause_s: float = Field(default=10.0, gt=0)
    connect_timeout_s: float = Field(default=10.0, gt=0)
    read_timeout_s: float = Field(default=30.0, gt=0)


class S3Storage:
    """Objects under s3://bucket/prefix."""

    def __init__(self, bucket: str, prefix: str = "", config: S3Config | None = None):
        if not bucket:
            raise UserError("store=s3:// names no bucket; write s3://bucket/prefix")
        self.bucket, self.prefix, self.config = (
            bucket,
            f"{prefix.strip('/')}/" if prefix.strip("/") else "",
            config or S3Config(),
        )
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.counts: Counter[str] = Counter()  # requests, retries, bytes_read, bytes_written
        self._lock = threading.Lock()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        settings: dict[str, Any] = {
            "retries": {"max_attempts": 0},
            "max_pool_connections": self.config.connections,
            "connect_timeout": self.config.connect_timeout_s,
            "read_timeout": self.config.read_timeout_s,
            # slices and shards carry their own xxh3-128; crc32 on both sides would double the CPU time of a byte
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        if endpoint:
            settings["s3"] = {"addressing_style": "path"}  # a bucket is rarely a host name on servers of one's own
        self._fs = s3fs.S3FileSystem(
            session=aws.session(), config_kwargs=settings, endpoint_url=endpoint, skip_instance_cache=True
        )

    @property
    def requests(self) -> int:
        return self.counts["requests"]

    def local_path(self, key: str) -> Path | None:
        checked_key(key)
        return None

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Bytes:
        data = self._run(lambda: self._read(key, start or 0, length))
        self._count(bytes_read=len(data))
        return data

    async def _read(self, key: str, start: int, length: int | None) -> memoryview:
        """Ranges of `part_bytes` at once; less than asked for at the end of the object, as of a file."""
        size = self.config.part_bytes
        first = memoryview(bytearray(min(size, FIRST_BYTES if length is None else length)))
        got, end = await self._request(f"GET {key}", lambda client: self._read_part(client, key, start, first))
        total = max(min(end - start, length if length is not None else end), 0)
        if total <= got:
            return first[:got]
        whole = memoryview(bytearray(total))
        whole[:got] = first[:got]

        async def part(at: int) -> None:
            into = whole[at : at + size]
            await self._request(f"GET {key}", lambda client: self._read_part(client, key, start + at, into))

        await self._gather([lambda at=at: part(at) for at in range(got, total, size)])
        return whole

    async def _read_part(self, client: Any, key: str, start: int, into: memoryview) -> tuple[int, int]:
        """Fills `into` as far as the object goes: (bytes read, size of the object). A body cut short is an error."""
        if not into:
            return 0, start
        try:
            answer = await client.get_object(**self._at(key), Range=f"bytes={start}-{start + len(into) - 1}")
        except botocore.exceptions.ClientError as error:
            if aws.code(error) in ("InvalidRange", "416"):
                return 0, start
            raise
        at = 0
        async with answer["Body"] as body:
            while chunk := await body.read(1 << 20):
                if at + len(chunk) > len(into):
                    raise StorageError(f"store={self.uri}: GET {key} ignored the range; use a store that has ranges")
                into[at : at + len(chunk)] = chunk
                at += len(chunk)
        if at < answer["ContentLength"]:
            raise aiohttp.ClientPayloadError(f"{at} bytes of {answer['ContentLength']}")
        return at, int(answer.get("ContentRange", f"/{at}").rpartition("/")[2])

    def write(self, key: str, data: Bytes) -> None:
        view = memoryview(data).cast("B")
        self._count(bytes_written=len(view))
        if len(view) <= self.config.part_bytes:
            body = bytes(view)
            self._run(lambda: self._request(f"PUT {key}", lambda client: client.put_object(**self._at(key), Body=body)))
            return
        self._run(lambda: self._upload(key, view))

    async def _upload(self, key: str, view: memoryview) -> None:
        begun = await self._request(f"POST {key}", lambda client: client.create_multipart_upload(**self._at(key)))
        upload = {"UploadId": begun["UploadId"]}
        faults.point("storage.upload_begun", key=key)

        async def part(number: int, at: int) -> dict[str, Any]:
            body = bytes(view[at : at + self.config.part_bytes])
            done = await self._request(
                f"PUT {key} part {number}",
                lambda client: client.upload_part(**self._at(key), **upload, PartNumber=number, Body=body),
            )
            faults.point("storage.part_uploaded", key=key, part=number)
            return {"PartNumber": number, "ETag": done["ETag"]}

        starts = range(0, len(view), self.config.part_bytes)
        parts = await self._gather([lambda n=n, at=at: part(n, at) for n, at in enumerate(starts, start=1)])

        async def complete(client: Any) -> None:
            try:
                await client.complete_multipart_upload(**self._at(key), **upload, MultipartUpload={"Parts": parts})
            except botocore.exceptions.ClientError as error:
                if aws.code(error) != "NoSuchUpload":
                    raise
                head = await client.head_object(**self._at(key))  # completed before, and the answer was lost
                if head["ContentLength"] != len(view):
                    raise

        await self._request(f"POST {key} complete", complete)

    def create(self, key: str, data: Bytes) -> bool:
        body = bytes(data)

        async def put(client: Any) -> bool:
            try:
                await client.put_object(**self._at(key), Body=body, IfNoneMatch="*")
            except botocore.exceptions.ClientError as error:
                if aws.code(error) not in ("PreconditionFailed", "412"):
                    raise
                # The object is ours if only the answer was lost: the HTTP client silently resends a PUT when a kept
                # connection turns out to be closed.
                found = await client.get_object(**self._at(key))
                async with found["Body"] as content:
                    return await content.read() == body
            return True

        return self._run(lambda: self._request(f"PUT {key}", put))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        after: dict[str, str] = {}
        while True:
            page = self._run(
                lambda after=after: self._request(
                    f"LIST {prefix}",
                    lambda client: client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **after),
                )
            )
            for found in page.get("Contents", []):
                yield Entry(found["Key"].removeprefix(self.prefix), found["Size"], found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            after = {"ContinuationToken": page["NextContinuationToken"]}

    def leftovers(self) -> Iterator[Entry]:
        after: dict[str, str] = {}
        while True:
            page = self._run(
                lambda after=after: self._request(
                    "LIST uploads",
                    lambda client: client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix, **after),
                )
            )
            for found in page.get("Uploads", []):
                key = f"{found['Key'].removeprefix(self.prefix)}{UPLOAD_MARK}{found['UploadId']}"
                yield Entry(key, 0, found["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, leftover: Entry) -> None:
        key, _, upload = leftover.key.partition(UPLOAD_MARK)
        self._run(
            lambda: self._request(
                f"DELETE {key}", lambda client: client.abort_multipart_upload(**self._at(key), UploadId=upload)
            )
        )

    def delete(self, key: str) -> None:
        self._run(lambda: self._request(f"DELETE {key}", lambda client: client.delete_object(**self._at(key))))

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        head = self._run(lambda: self._request(f"HEAD {key}", lambda client: client.head_object(**self._at(key))))
        return head["ContentLength"]

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + checked_key(key)}

    def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        return cast(T, sync(self._fs.loop, work))

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counts.update(more)

    async def _gather(self, work: Sequence[Callable[[], Awaitable[T]]]) -> Sequence[T]:
        """All of `work`, at most `connections` at once; the first failure cancels the rest."""
        room = asyncio.Semaphore(self.config.connections)

        async def one(job: Callable[[], Awaitable[T]]) -> T:
            async with room:
                return await job()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(job)) for job in work]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _request(self, what: str, send: Callable[[Any], Awaitable[T]]) -> T:
        """The answer to one request; temporary failures are retried for `retry_s`, then Unavailable says why."""
        deadline: float | None = None
        pause, refreshed = self.config.pause_s, False
        while True:
            try:
                self._count(requests=1)
                return await send(await self._fs.set_session())
            except botocore.exceptions.ClientError as error:
                if aws.code(error) in EXPIRED and not refreshed:
                    refreshed, self._fs.session = True, aws.session()  # a session keeps its credentials
                    await self._fs.set_session(refresh=True)
                    continue
                if not (aws.status(error) >= 500 or aws.status(error) == 429 or aws.code(error) in TRANSIENT):
                    raise self._refusal(what, error) from None
                problem: Exception = error
            except botocore.exceptions.NoCredentialsError:
                raise StorageError(
                    f"store={self.uri}: no AWS credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or run where a role gives them"
                ) from None
            except (*NETWORK_ERRORS, *CREDENTIAL_ERRORS) as error:
                problem = error
            except botocore.exceptions.BotoCoreError as error:
                raise StorageError(
                    f"store={self.uri}: {what}: {aws.describe(error)}; log in again, or check AWS_PROFILE and the URI"
                ) from None
            now = time.monotonic()
            deadline = now + self.config.retry_s if deadline is None else deadline
            if now > deadline:
                raise Unavailable(
                    f"store={self.uri}: {what} failed for {self.config.retry_s:.0f} s, last with "
                    f"{aws.describe(problem)}; is the endpoint up and reachable? run again to resume"
                )
            self._count(retries=1)
            logger.info("%s %s failed (%s), trying again", self.uri, what, aws.describe(problem))
            await asyncio.sleep(random.uniform(0, pause))  # full jitter: clients that failed together do not retry so
            pause = min(2 * pause, self.config.longest_pause_s)

    def _refusal(self, what: str, error: botocore.exceptions.ClientError) -> Exception:
        code, status = aws.code(error), aws.status(error)
        start = f"store={self.uri}: {what}"
        match code:
            case "NoSuchBucket":
                return StorageError(f"{start}: there is no bucket {self.bucket}; create it or correct the URI")
            case "NoSuchKey" | "NotFound" | "404":
                return FileNotFoundError(f"{self.uri}: {what}: no such object")
            case "RequestTimeTooSkewed":
                return StorageError(f"{start}: this machine's clock is minutes off the storage's; set it (NTP)")
            case "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" | "301":
                return StorageError(f"{start}: the bucket is in another region ({code}); set AWS_REGION to it")
            case "InvalidAccessKeyId" | "SignatureDoesNotMatch":
                return StorageError(f"{start}: the credentials are wrong ({code}); check AWS_PROFILE or the access key")
        if code in EXPIRED:
            return StorageError(f"{start}: the credentials have expired and reloading them gave the same; log in again")
        if status == 403:
            return ReadOnlyError(
                f"{start}: access denied ({code}); this identity lacks the right, or the bucket is not ours"
            )
        return StorageError(f"{start}: refused with {aws.describe(error)}")
