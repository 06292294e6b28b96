"""S3 up and down: in parallel, only what changed, checked, and on again after a bad connection.

What is there already is told by size and content, not by time: by S3's ETag where that is an MD5,
else by the SHA-256 that an upload leaves in the object's metadata. A second run therefore moves
nothing, and an interrupted one goes on where it stopped. Settings and credentials are boto3's own
(AWS_PROFILE, AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visiontuner.data.archive import explain_write
from visiontuner.data.digests import file_digest
from visiontuner.data.objects import (
    PART_BYTES,
    Memory,
    RemoteFile,
    file_md5,
    files_in,
    has_content_of,
    is_md5,
    places,
    split_folder,
    split_uri,
)
from visiontuner.data.s3 import (
    LARGE_AT_ONCE,
    PARTS_AT_ONCE,
    THREADS,
    connect,
    explained,
    head,
    is_passing,
    list_files,
)
from visiontuner.data.transfer import Damaged, Transfers
from visiontuner.errors import DataError, DownloadError

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
        self._encrypted = (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
        )
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
        from s3transfer.manager import TransferConfig, TransferManager

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
    from s3transfer.subscribers import BaseSubscriber

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
        from botocore.exceptions import FlexibleChecksumError, IncompleteReadError

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
        from botocore.exceptions import ClientError

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
