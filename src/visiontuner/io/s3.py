"""S3: names, clients, parallel uploads and downloads, complete copies."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as NotConnected
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from visiontuner import interrupts
from visiontuner.errors import DataError, DownloadError, ServingError
from visiontuner.io.aws import AwsRefused, encryption, is_busy, require_owner
from visiontuner.io.aws import explained as aws_explained
from visiontuner.io.download import explain_write
from visiontuner.io.files import (
    file_digest,
    file_state,
    is_no_data,
    read_cached_json,
    write_cached_json,
    write_json,
)
from visiontuner.paths import split_folder, split_uri

# Files and the objects on S3 that hold them: names, digests, memory. Nothing here asks S3.


PART_BYTES = 8 << 20
"""A file of this size or more goes up in parts of this size; boto3 and `aws s3` do the same."""
_ETAG = re.compile(r"([0-9a-f]{32})(?:-([0-9]+))?")
_LONGEST_KEY = 1024  # bytes, S3's own limit


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One object: `name` is its key without the folder's prefix; `size` in bytes."""

    name: str
    key: str
    size: int
    etag: str


def files_in(folder: Path) -> dict[str, Path]:
    """All files under a folder of images by name (posix, relative), links followed.

    Hidden ones stay, and what commands leave in a folder: searches, MLflow's store, the cache.

    Raises:
        DataError: it is no folder, a folder in it cannot be read, or a name fits no key.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    try:
        paths = sorted(_walk(folder, frozenset()))
    except OSError as error:
        raise DataError(f"Cannot read {error.filename}: {error.strerror}.") from None
    return {_key_name(path.relative_to(folder).as_posix()): path for path in paths}


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:
        paths = [Path(entry) for entry in entries]
    for path in paths:
        if is_no_data(path):
            continue
        if path.is_dir():
            yield from _walk(path, above | {real})
        elif path.is_file():
            yield path


def _key_name(name: str) -> str:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name!a} is no UTF-8 and can be no key on S3: rename it.") from None
    if len(encoded) > _LONGEST_KEY:
        raise DataError(f"{name[:60]}… is too long for a key on S3 ({len(encoded)} bytes).")
    return name


def places(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where objects go by name; never outside the folder.

    Raises:
        DataError: a name leads elsewhere, or is a file and a folder at once.
    """
    found: dict[str, Path] = {}
    for name in names:
        parts = name.split("/")
        if "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise DataError(f"The object {name!r} would leave the folder: rename it on S3.")
        found[name] = folder.joinpath(*parts)
    for name in found:
        for above in PurePosixPath(name).parents:
            if str(above) in found:
                raise DataError(f"On S3 {str(above)!r} is a file and a folder: rename one of them.")
    return found


def has_content_of(path: Path, etag: str) -> bool:
    """Whether a file is what an ETag says: its MD5, or the MD5 of its parts' MD5s.

    An ETag of an object that a KMS key encrypts, or of parts of another size, fits no file.
    """
    match = _ETAG.fullmatch(etag)
    if match is None:
        return False
    if match[2] is None:
        return file_md5(path) == etag
    parts = -(-path.stat().st_size // PART_BYTES)
    return int(match[2]) == parts and _md5_of_parts(path) == match[1]


def is_md5(etag: str) -> bool:
    """Whether an ETag looks like an MD5; that of an encrypted object does, too."""
    return bool(re.fullmatch(r"[0-9a-f]{32}", etag))


def file_md5(path: Path) -> str:
    """MD5 (hex) of a file; S3's ETag, which protects against accidents and nothing else."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def _md5(content: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(content, usedforsecurity=False)


def _md5_of_parts(path: Path) -> str:
    digests = b""
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digests += _md5(part).digest()
    return _md5(digests).hexdigest()


class Memory:
    """Which object each file was when it came: it is not read again while it stays as it was.

    Args:
        path: a JSON file, which may be missing or damaged; None: nothing is remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows = read_cached_json(path) if path is not None else {}

    def knows(self, name: str, etag: str, path: Path) -> bool:
        """Whether a file is still what came as this object."""
        return self._rows.get(name) == _row(etag, path)

    def add(self, name: str, etag: str, path: Path) -> None:
        """A file is this object now."""
        self._rows[name] = _row(etag, path)

    def save(self, names: Mapping[str, object]) -> None:
        """Write down what is known of these names and forget the others."""
        if self._path is not None:
            rows = {name: row for name, row in self._rows.items() if name in names}
            write_cached_json(self._path, rows)


def _row(etag: str, path: Path) -> list[object]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [etag, *file_state(status)]


# boto3's S3: the client for many threads, what lies where, and its errors in one line.


# One request to S3 waits some 20 to 50 ms: 32 at a time are what one interpreter can prepare.
THREADS = 32
# Of large files: 4 x 4 parts of 8 MiB are 128 MiB in memory.
LARGE_AT_ONCE, PARTS_AT_ONCE = 4, 4
# A lost part of a large file is sent again by boto3 itself; `Transfers` waits for longer.
ATTEMPTS = 3
_MISSING = ("404", "NoSuchKey")
_DAMAGED = "BadDigest"  # on its way
_ELSEWHERE = (
    "301",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraint",
)


def connect(session: Any = None, region: str | None = None, *, owner: str | None = None) -> Any:
    """boto3's S3 client for many threads.

    Args:
        session: a boto3 session, of a role that was taken on say; the caller's own if None.
        region: as the settings say if None; buckets elsewhere are found all the same.
        owner: the account that has to hold every bucket; None: whoever holds it.

    Raises:
        UserMistake: AWS's settings cannot be read.
    """

    with aws_explained("read AWS's settings"):
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=THREADS + LARGE_AT_ONCE * PARTS_AT_ONCE,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        )
        client = (session or boto3.Session()).client("s3", region_name=region, config=config)
    client.meta.events.register_last("before-call.s3", _send_at_once)
    if owner is not None:
        require_owner(client.meta.events, owner)
    return client


def _send_at_once(model: Any, params: dict[str, Any], **_: Any) -> None:
    """Small files do not wait until S3 says that it wants them: a round trip less for each."""
    if model.name == "PutObject":
        params["headers"].pop("Expect", None)


def list_files(client: Any, bucket: str, prefix: str) -> list[RemoteFile]:
    """All objects under a prefix but the empty ones that stand for folders."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [
        RemoteFile(
            entry["Key"][len(prefix) :], entry["Key"], entry["Size"], entry["ETag"].strip('"')
        )
        for page in pages
        for entry in page.get("Contents", ())
        if not entry["Key"].endswith("/")
    ]


def head(client: Any, bucket: str, key: str) -> Mapping[str, Any]:
    """What S3 says of an object; nothing if it is not there."""

    try:
        answer: Mapping[str, Any] = client.head_object(Bucket=bucket, Key=key)
        return answer
    except ClientError as error:
        if error.response["Error"]["Code"] in _MISSING:
            return {}
        raise


def read(client: Any, bucket: str, key: str) -> bytes | None:
    """A small object's content; None if it is not there."""

    try:
        with client.get_object(Bucket=bucket, Key=key)["Body"] as body:
            content: bytes = body.read()
            return content
    except ClientError as error:
        if error.response["Error"]["Code"] in _MISSING:
            return None
        raise


def is_passing(error: Exception) -> bool:
    """Whether an error is one of the connection or of a busy S3: asking again may help."""

    if isinstance(error, ClientError):
        return is_busy(error.response) or error.response["Error"]["Code"] == _DAMAGED
    if isinstance(error, SSLError):
        return False
    return isinstance(
        error, NotConnected | HTTPClientError | IncompleteReadError | ResponseStreamingError
    )


def is_out_of_reach(error: BaseException) -> bool:
    """Whether S3 could not be asked at all; what it refuses is another matter."""

    return isinstance(error, ServingError) and not isinstance(error, AwsRefused)


@contextmanager
def explained(bucket: str, doing: str) -> Iterator[None]:
    """S3's errors in the block become ours, in one line without credentials.

    Args:
        doing: "read" or "write to".

    Raises:
        UserMistake: no bucket, no permission, another region, no credentials.
        ServingError: S3 cannot be reached, or refuses for another reason.
    """

    with aws_explained(f"{doing} s3://{bucket}"):
        try:
            yield
        except ClientError as error:
            advice = _advice(error.response, bucket, doing)
            if advice is None:
                raise
            raise DataError(advice) from None


def _advice(response: Mapping[str, Any], bucket: str, doing: str) -> str | None:
    code = response["Error"].get("Code", "")
    if code in ("NoSuchBucket", "404"):
        return f"There is no bucket {bucket!r}. Correct the name, or make it: `aws s3 mb s3://{bucket}`."
    if code in ("403", "AccessDenied", "AllAccessDisabled"):
        needed = "s3:GetObject" if doing == "read" else "s3:PutObject, s3:GetObject"
        return (
            f"These credentials may not {doing} s3://{bucket}. They need s3:ListBucket on the "
            f"bucket and {needed} on its objects (docs/aws.md, Images on S3), or set AWS_PROFILE "
            "to others."
        )
    if code in _ELSEWHERE:
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = headers.get("x-amz-bucket-region") or response["Error"].get("Region")
        return (
            f"The bucket {bucket!r} is in another region. Set AWS_REGION={region}."
            if region
            else f"The bucket {bucket!r} is in another region. Set AWS_REGION to its own."
        )
    if code == "InvalidObjectState":
        return f"Objects in s3://{bucket} are archived (Glacier). Restore them first."
    if code == "NoSuchKey":
        return f"What lies in s3://{bucket} changed meanwhile. Run the same command again."
    return None


# Many transfers side by side: counted, tried again while S3 is away, ended together.


Result = TypeVar("Result")

# What fails for so long is given up. The first answer is awaited less long: an address that is
# wrong never answers.
PATIENCE_SECONDS = 120.0
FIRST_PATIENCE_SECONDS = 45.0
_LONGEST_PAUSE_SECONDS = 8.0
_DAMAGED_TIMES = 3


class Damaged(Exception):
    """What came is not what was promised."""


class Transfers:
    """One run of transfers.

    Args:
        total: bytes to move.
        is_passing: whether an error is one of the connection, that passes.
        progress: called with (bytes so far, bytes in all), one call at a time.
        note: told once for each time that the other side is away.
    """

    def __init__(
        self,
        total: int,
        *,
        is_passing: Callable[[Exception], bool],
        progress: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._total = total
        self._done = 0
        self._is_passing = is_passing
        self._progress = progress
        self._note = note
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._has_answered = False
        self._is_away = False

    def run(self, work: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
        """Do everything; the first error ends all of it."""
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(one) for one in work]
            try:
                for future in interrupts.as_completed(futures):
                    future.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]

    @property
    def is_stopped(self) -> bool:
        """Whether another transfer has failed, or the user has had enough."""
        return self._stopped.is_set()

    def go_on(self) -> None:
        """For a long transfer to ask now and then.

        Raises:
            CancelledError: all of it has been ended.
        """
        if self.is_stopped:
            raise CancelledError

    def advance(self, count: int) -> None:
        """So many bytes more; fewer if something has to be moved again."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def patiently(self, action: Callable[[], Result]) -> Result:
        """Do it, again after an error that passes, until it has failed for too long."""
        failures = damages = 0
        failing_since: float | None = None
        while True:
            self.go_on()
            try:
                result = action()
            except Damaged:
                damages += 1
                if damages >= _DAMAGED_TIMES:
                    raise
            except Exception as error:
                failing_since = failing_since or time.monotonic()
                if not self._is_passing(error) or not self._may_wait(failing_since):
                    raise
                pause = min(0.25 * 2**failures, _LONGEST_PAUSE_SECONDS)
                failures += 1
                if self._stopped.wait(pause):
                    raise
            else:
                self._succeeded()
                return result

    def _may_wait(self, failing_since: float) -> bool:
        with self._lock:
            patience = PATIENCE_SECONDS if self._has_answered else FIRST_PATIENCE_SECONDS
            left = failing_since + patience - time.monotonic()
            if left > 0 and not self._is_away and self._note is not None:
                self._note(f"S3 does not answer; asking again for {left:.0f} s.")
            self._is_away = True
            return left > 0

    def _succeeded(self) -> None:
        with self._lock:
            self._has_answered = True
            self._is_away = False


# S3 up and down: in parallel, only what changed, checked, and on again after a bad connection.
#
# What is there already is told by size and content, not by time: by S3's ETag where that is an
# MD5, else by the SHA-256 that an upload leaves in the object's metadata. A second run therefore
# moves nothing, and an interrupted one goes on where it stopped. Settings and credentials are
# boto3's own (AWS_PROFILE, AWS_ENDPOINT_URL, …).


Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all), from several threads, one at a time."""
Note = Callable[[str], None]

INCOMING = ".incoming"
"""In a folder that is being filled: what has not come whole."""
_BLOCK = 1 << 20
_SHA256 = "sha256"  # in an object's metadata
_CHANGED = ("412", "PreconditionFailed", "416", "InvalidRange")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a transfer did: files moved and their bytes, files that were there already.

    `others`: files that an upload's place holds beside them.
    """

    files: int
    skipped: int
    bytes: int
    others: int = 0


def upload_folder(
    folder: Path,
    uri: str,
    *,
    client: Any = None,
    kms_key: str | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Moved:
    """Bring a folder's files to S3; hidden ones stay, and nothing there is deleted.

    Args:
        uri: `s3://BUCKET/FOLDER`.
        client: from `s3.connect`.
        kms_key: encrypts what is sent; the bucket's own setting if None.
        note: told when S3 does not answer and is asked again.

    Raises:
        UserMistake: no such bucket, no permission, no credentials, or a file that cannot be read.
        ServingError: S3 stays away, or refuses for another reason.
    """
    bucket, prefix = split_folder(uri)
    files = files_in(folder)
    total = sum(path.stat().st_size for path in files.values())
    transfers = Transfers(total, is_passing=is_passing, progress=progress, note=note)
    with explained(bucket, "write to"):
        work = _Upload(client or connect(), bucket, kms_key, transfers)
        remotes = transfers.patiently(lambda: list_files(work.client, bucket, prefix))
        there = {remote.name: remote for remote in remotes}
        sent = transfers.run(
            [
                partial(work.bring, path, prefix + name, there.get(name))
                for name, path in files.items()
            ],
            THREADS,
        )
    return _moved(sent, others=len(there.keys() - files.keys()))


def download_folder(
    uri: str,
    folder: Path,
    *,
    client: Any = None,
    memory: Path | None = None,
    mirror: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Moved:
    """Bring everything under a URI into a folder; each file there is whole, new or old.

    Args:
        uri: `s3://BUCKET/FOLDER`.
        client, note: as for `upload_folder`.
        memory: a JSON file outside the folder; with it, files that came earlier are not read again.
        mirror: files that are not on S3 (any more) are deleted, if anything is there at all.

    Raises:
        UserMistake: no such bucket, no permission, no credentials, a key that leads out of the
            folder, or a disk that is full.
        DownloadError: what came is not what S3 promised, three times.
        ServingError: S3 stays away, or refuses for another reason.
    """
    bucket, prefix = split_folder(uri)
    client = client or connect()
    with explained(bucket, "read"):
        asking = Transfers(0, is_passing=is_passing, note=note)
        remotes = asking.patiently(lambda: list_files(client, bucket, prefix))
        work = _Downloads(client, bucket, folder, Memory(memory))
        moved = work.bring_all(remotes, progress, note)
    if mirror and remotes:
        _delete_others(folder, {remote.name for remote in remotes})
    return moved


def download_file(
    uri: str,
    folder: Path,
    *,
    client: Any = None,
    memory: Path | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Path:
    """Bring one object into a folder, under its own name, unless it is there; raises as above."""
    bucket, key = split_uri(uri)
    client = client or connect()
    with explained(bucket, "read"):
        asking = Transfers(0, is_passing=is_passing, note=note)
        found = asking.patiently(lambda: head(client, bucket, key)) if key else {}
        if not found:
            raise DataError(f"There is no object {uri}: correct the name (`aws s3 ls` lists them).")
        name = key.rpartition("/")[2]
        remote = RemoteFile(name, key, found["ContentLength"], found["ETag"].strip('"'))
        work = _Downloads(client, bucket, folder, Memory(memory))
        work.bring_all([remote], progress, note)
    return folder / name


def _moved(sent: Sequence[int | None], *, others: int = 0) -> Moved:
    counts = [count for count in sent if count is not None]
    return Moved(
        files=len(counts), skipped=len(sent) - len(counts), bytes=sum(counts), others=others
    )


class _Upload:
    """Files on their way up, in any thread."""

    def __init__(self, client: Any, bucket: str, kms_key: str | None, transfers: Transfers) -> None:
        self.client = client
        self._bucket = bucket
        self._transfers = transfers
        self._encrypted = encryption(kms_key)
        self._large = threading.BoundedSemaphore(LARGE_AT_ONCE)

    def bring(self, path: Path, key: str, there: RemoteFile | None) -> int | None:
        """Bytes sent, or None where nothing had to be."""
        try:
            size = path.stat().st_size
            if there is not None and there.size == size and self._is_same(path, there):
                self._transfers.advance(size)
                return None
            if size < PART_BYTES:
                content = path.read_bytes()
                self._transfers.patiently(lambda: self._put(content, key))
                self._transfers.advance(size)
            else:
                digest = file_digest(path)
                with self._large:
                    self._transfers.patiently(lambda: self._put_parts(path, key, digest))
            return size
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from None

    def _is_same(self, path: Path, there: RemoteFile) -> bool:
        if has_content_of(path, there.etag):
            return True
        found = self._transfers.patiently(lambda: head(self.client, self._bucket, there.key))
        return _says_sha256_of(path, found)

    def _put(self, content: bytes, key: str) -> None:
        digest = hashlib.sha256(content)
        self.client.put_object(
            Bucket=self._bucket,
            Key=key,
            Body=content,
            # S3 refuses the object if it arrives as anything else.
            ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            Metadata={_SHA256: digest.hexdigest()},
            **self._encrypted,
        )

    def _put_parts(self, path: Path, key: str, digest: str) -> None:
        config = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_request_concurrency=PARTS_AT_ONCE,
        )
        extra = {"Metadata": {_SHA256: digest}, "ChecksumAlgorithm": "SHA256", **self._encrypted}
        with TransferManager(self.client, config) as manager:
            watch = [_watch(self._transfers)]
            manager.upload(str(path), self._bucket, key, extra, watch).result()


def _watch(transfers: Transfers) -> Any:
    class Watch(BaseSubscriber):  # type: ignore[misc, unused-ignore]
        def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
            transfers.advance(bytes_transferred)
            if transfers.is_stopped:
                future.cancel()

    return Watch()


class _Downloads:
    """Objects on their way down, in any thread; half a file waits in `incoming`."""

    def __init__(self, client: Any, bucket: str, folder: Path, memory: Memory) -> None:
        self._client = client
        self._bucket = bucket
        self._folder = folder
        self._incoming = folder / INCOMING
        self._memory = memory
        self._transfers = Transfers(0, is_passing=is_passing)

    def bring_all(
        self, remotes: Sequence[RemoteFile], progress: Progress | None, note: Note | None
    ) -> Moved:
        """Bring what is not here."""
        targets = places(self._folder, [remote.name for remote in remotes])
        total = sum(remote.size for remote in remotes)
        self._transfers = Transfers(total, is_passing=is_passing, progress=progress, note=note)
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._require_room(remotes, targets)
            came = self._transfers.run(
                [partial(self._bring, remote, targets[remote.name]) for remote in remotes], THREADS
            )
        except OSError as error:
            raise DataError(explain_write(error, self._folder)) from None
        finally:
            self._memory.save(targets)
        shutil.rmtree(self._incoming, ignore_errors=True)
        return _moved(came)

    def _require_room(self, remotes: Sequence[RemoteFile], targets: Mapping[str, Path]) -> None:
        missing = [remote.size for remote in remotes if not targets[remote.name].exists()]
        free = shutil.disk_usage(self._folder).free
        if sum(missing) > free:
            raise DataError(
                f"The disk is too small: {self._folder} needs {sum(missing) / 1e9:.1f} GB and "
                f"{free / 1e9:.1f} GB are free. Make room, or point VISIONTUNER_CACHE elsewhere."
            )

    def _bring(self, remote: RemoteFile, target: Path) -> int | None:
        """Bytes that came, or None where the file was here."""
        try:
            if self._is_here(remote, target):
                self._transfers.advance(remote.size)
                return None
            name = hashlib.sha256(remote.key.encode()).hexdigest()[:24]
            part = self._incoming / f"{name}-{remote.etag}"
            self._transfers.advance(_size(part))
            etag = self._transfers.patiently(lambda: self._receive(remote, part))
            size = part.stat().st_size
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
            self._memory.add(remote.name, etag, target)
            return size
        except Damaged as error:
            raise DownloadError(f"{error} Run the same command again.") from None
        except OSError as error:
            raise DataError(explain_write(error, target)) from None

    def _is_here(self, remote: RemoteFile, target: Path) -> bool:
        if not target.is_file() or target.stat().st_size != remote.size:
            return False
        if self._memory.knows(remote.name, remote.etag, target):
            return True
        same = has_content_of(target, remote.etag)
        if not same:
            found = self._transfers.patiently(lambda: head(self._client, self._bucket, remote.key))
            same = _says_sha256_of(target, found)
        if same:
            self._memory.add(remote.name, remote.etag, target)
        return same

    def _receive(self, remote: RemoteFile, part: Path) -> str:
        """Fill `part`, on from where it broke off; the ETag of what came."""
        if _size(part) >= remote.size:
            self._drop(part)
        begun = _size(part)
        answer = self._ask(remote, begun)
        if answer is None:  # the object is another one by now
            self._drop(part)
            begun, answer = 0, self._client.get_object(Bucket=self._bucket, Key=remote.key)
        if not self._write(answer, part, begun):
            self._drop(part)
            raise Damaged(f"{remote.key!r} came damaged from s3://{self._bucket}.")
        return str(answer["ETag"]).strip('"')

    def _write(self, answer: Mapping[str, Any], part: Path, begun: int) -> bool:
        """Add what comes to a file; whether the file is what S3 holds then."""

        size, is_right = begun + answer["ContentLength"], True
        try:
            with answer["Body"] as body, part.open("ab" if begun else "wb") as file:
                while block := body.read(_BLOCK):
                    file.write(block)
                    self._transfers.advance(len(block))
                    self._transfers.go_on()
        except FlexibleChecksumError:
            is_right = False
        if _size(part) < size:  # broken off, whatever its checksum: the rest is asked for next
            raise IncompleteReadError(actual_bytes=_size(part), expected_bytes=size)
        return is_right and _is_right(part, answer)

    def _drop(self, part: Path) -> None:
        self._transfers.advance(-_size(part))
        part.unlink(missing_ok=True)

    def _ask(self, remote: RemoteFile, begun: int) -> Mapping[str, Any] | None:
        """The object's rest, None if it is not the object any more whose beginning is here."""

        rest = {"Range": f"bytes={begun}-", "IfMatch": f'"{remote.etag}"'} if begun else {}
        try:
            answer: Mapping[str, Any] = self._client.get_object(
                Bucket=self._bucket, Key=remote.key, **rest
            )
        except ClientError as error:
            if begun and error.response["Error"]["Code"] in _CHANGED:
                return None
            raise
        return answer


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_right(path: Path, answer: Mapping[str, Any]) -> bool:
    """Whether what came is what S3 holds; botocore has compared its own checksum by now."""
    if _SHA256 in answer.get("Metadata", {}):
        return _says_sha256_of(path, answer)
    etag = str(answer["ETag"]).strip('"')
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256"
    is_content = is_md5(etag) and not encrypted and "SSECustomerAlgorithm" not in answer
    return not is_content or file_md5(path) == etag


def _says_sha256_of(path: Path, found: Mapping[str, Any]) -> bool:
    known = found.get("Metadata", {}).get(_SHA256)
    return known is not None and known == file_digest(path)


def _delete_others(folder: Path, names: set[str]) -> None:
    """Delete files that are no objects, and folders that are empty without them."""
    for where, _, files in os.walk(folder, topdown=False):
        for file in files:
            path = Path(where, file)
            if path.relative_to(folder).as_posix() not in names:
                path.unlink(missing_ok=True)
        if Path(where) != folder and not any(Path(where).iterdir()):
            Path(where).rmdir()


# A complete copy of an earlier download, used while S3 cannot be reached.


class WholeCopy(AbstractContextManager["WholeCopy", bool | None]):
    """Around a download: where S3 is away, a complete earlier copy is enough, and that is said.

    Only if not a file of it has changed since: a copy that was being brought up to date is no whole
    one. What S3 refuses stays refused.

    Args:
        path: the file or folder that the download brings.
        note: told that the copy is used.
    """

    def __init__(self, path: Path, note: Callable[[str], None] | None) -> None:
        self._path = path
        self._mark = path.with_name(f".{path.name}.whole.json")
        self._note = note

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            if self._path.exists():
                write_json(self._mark, {"digest": self._digest(), "time": time.time()})
            return False
        came = self._came_whole() if is_out_of_reach(error) else None
        if came is None:
            return False
        if self._note is not None:
            when = time.strftime("%d %b %Y, %H:%M", time.localtime(came))
            self._note(f"S3 cannot be reached: the copy in {self._path} is used, whole on {when}.")
        return True

    def _came_whole(self) -> float | None:
        """When, in seconds since the epoch; None: it is not, or something of it has changed."""
        try:
            mark = json.loads(self._mark.read_text(encoding="utf-8"))
            return float(mark["time"]) if mark["digest"] == self._digest() else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _digest(self) -> str:
        """Of every file's name, size, times and inode."""
        paths = sorted(self._path.rglob("*")) if self._path.is_dir() else [self._path]
        rows = []
        for path in paths:
            if path.is_file():
                name = path.relative_to(self._path).as_posix()
                rows.append([name, *file_state(path.stat())])
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
