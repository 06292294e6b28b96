"""Images to S3 and back: a real moto server, and a proxy before it that has bad days."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from click.testing import CliRunner
from PIL import Image

from visiontuner.cli.main import main
from visiontuner.data.dataset import fetch_source
from visiontuner.errors import DataError, DownloadError, ServingError, UserMistake
from visiontuner.io import s3 as s3_module
from visiontuner.io import s3 as storage_module
from visiontuner.io import s3 as transfer_module
from visiontuner.io.s3 import (
    INCOMING,
    PART_BYTES,
    Moved,
    download_folder,
    files_in,
    has_content_of,
    places,
    upload_folder,
)
from visiontuner.paths import split_uri

BUCKET = "photos"
URI = f"s3://{BUCKET}/set one"
DIRECT: list[Any] = []  # boto3's client of the server itself, not through the proxy
# What the fixture shortens.
REAL = {
    "_LONGEST_PAUSE_SECONDS": transfer_module._LONGEST_PAUSE_SECONDS,
    "ATTEMPTS": s3_module.ATTEMPTS,
}
SECRET = "wJalrXUtnFEMI-secret"


@pytest.fixture
def s3(
    moto: tuple[str, int],
    proxy_before: Callable[[tuple[str, int]], Any],
    use_aws: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """An empty bucket behind a proxy; this process can reach no other S3."""
    direct = f"http://{moto[0]}:{moto[1]}"
    requests.post(f"{direct}/moto-api/reset", timeout=10).raise_for_status()
    proxy = proxy_before(moto)
    proxy.message = f"no, {SECRET}"
    use_aws(proxy.url, SECRET)
    monkeypatch.setattr(transfer_module, "_LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(s3_module, "ATTEMPTS", 1)
    if not DIRECT:
        DIRECT.append(boto3.client("s3", endpoint_url=direct))
    DIRECT[0].create_bucket(Bucket=BUCKET)
    return proxy


def image(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


FILES = {
    "train/a b/0.png": image("red"),
    "train/große Hunde/1 ü+%.png": image("blue"),
    "valid/a b/2&3=4?.png": image("lime"),
    "valid/große Hunde/犬.png": image("gray"),
    "empty.txt": b"",
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put(name: str, content: bytes, **more: Any) -> None:
    DIRECT[0].put_object(Bucket=BUCKET, Key=name, Body=content, **more)


def moved(answer: Moved) -> tuple[int, int]:
    return answer.files, answer.skipped


# What moves


def test_a_folder_comes_back_as_it_went_and_a_second_run_moves_nothing(s3, tmp_path):
    here, back = write(tmp_path / "here"), tmp_path / "back"
    size = sum(map(len, FILES.values()))
    assert upload_folder(here, URI) == Moved(files=5, skipped=0, bytes=size)
    assert s3.count("PUT") == 5
    assert upload_folder(here, f"{URI}/") == Moved(files=0, skipped=5, bytes=0)
    assert s3.count("PUT") == 5
    assert download_folder(URI, back) == Moved(files=5, skipped=0, bytes=size)
    assert held(back) == FILES
    assert download_folder(URI, back) == Moved(files=0, skipped=5, bytes=0)
    assert s3.count("GET") == 5


def test_a_small_file_is_sent_in_one_round_trip_with_its_checksum(s3, tmp_path):
    content, sent = b"content", []
    s3.rule = lambda method, _path, headers: sent.append(headers) if method == "PUT" else None
    upload_folder(write(tmp_path / "here", {"a": content}), URI)
    (headers,) = sent
    assert headers.get("Expect") is None
    digest = hashlib.sha256(content)
    assert headers["x-amz-checksum-sha256"] == base64.b64encode(digest.digest()).decode()
    assert headers["x-amz-meta-sha256"] == digest.hexdigest()


@pytest.mark.usefixtures("s3")
def test_a_changed_file_of_the_same_size_and_time_moves_and_others_do_not(tmp_path):
    here, back = write(tmp_path / "here", {"a": b"one", "b": b"two"}), tmp_path / "back"
    upload_folder(here, URI)
    download_folder(URI, back, memory=tmp_path / "memory.json")
    before = (here / "a").stat()
    (here / "a").write_bytes(b"six")
    os.utime(here / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert moved(upload_folder(here, URI)) == (1, 1)
    assert moved(download_folder(URI, back, memory=tmp_path / "memory.json")) == (1, 1)
    assert held(back) == {"a": b"six", "b": b"two"}
    # A file that somebody changed here is no longer what S3 holds, whatever its time says.
    before = (back / "b").stat()
    (back / "b").write_bytes(b"2wo")
    os.utime(back / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert moved(download_folder(URI, back, memory=tmp_path / "memory.json")) == (1, 1)
    assert held(back)["b"] == b"two"


def test_a_large_file_goes_in_parts_and_is_known_again(s3, tmp_path):
    content = os.urandom(PART_BYTES) + b"more"
    here = write(tmp_path / "here", {"large": content})
    steps: list[tuple[int, int]] = []
    upload_folder(here, URI, progress=lambda *step: steps.append(step))
    assert steps[-1] == (len(content), len(content))
    assert DIRECT[0].head_object(Bucket=BUCKET, Key="set one/large")["ETag"].endswith('-2"')
    before = s3.count("PUT")
    assert moved(upload_folder(here, URI)) == (0, 1)
    steps.clear()
    assert moved(download_folder(URI, tmp_path / "back", progress=lambda *s: steps.append(s))) == (
        1,
        0,
    )
    assert held(tmp_path / "back") == {"large": content}
    assert steps[-1] == (len(content), len(content))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert moved(download_folder(URI, tmp_path / "back")) == (0, 1)
    assert s3.count("PUT") == before


def test_the_etag_of_parts_is_the_md5_of_their_md5s(tmp_path):
    parts = [b"a" * PART_BYTES, b"b"]
    path = tmp_path / "file"
    path.write_bytes(b"".join(parts))
    digest = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
    assert has_content_of(path, f"{digest}-2")
    assert not has_content_of(path, f"{digest}-3")
    assert has_content_of(path, hashlib.md5(b"".join(parts)).hexdigest())
    assert not has_content_of(path, digest)
    assert not has_content_of(path, "no md5 at all")


@pytest.mark.usefixtures("s3")
def test_encrypted_objects_whose_etag_says_nothing_are_known_by_their_sha256(tmp_path):
    here = write(tmp_path / "here", {"a": b"one"})
    # Sent in parts of another size: as with a KMS key the ETag is no digest of the file.
    content = b"x" * (PART_BYTES + 5)
    (here / "large").write_bytes(content)
    upload_folder(here, URI, kms_key="my-key")
    found = DIRECT[0].head_object(Bucket=BUCKET, Key="set one/a")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", "my-key")
    upload = {"Bucket": BUCKET, "Key": "set one/large"}
    begun = DIRECT[0].create_multipart_upload(
        **upload, Metadata={"sha256": hashlib.sha256(content).hexdigest()}
    )["UploadId"]
    cuts = (content[: 6 << 20], content[6 << 20 :])
    tags = [
        DIRECT[0].upload_part(**upload, UploadId=begun, PartNumber=n, Body=cut)["ETag"]
        for n, cut in enumerate(cuts, 1)
    ]
    parts = [{"ETag": tag, "PartNumber": n} for n, tag in enumerate(tags, 1)]
    DIRECT[0].complete_multipart_upload(**upload, UploadId=begun, MultipartUpload={"Parts": parts})
    assert moved(upload_folder(here, URI)) == (0, 2)
    assert moved(download_folder(URI, tmp_path / "back")) == (2, 0)
    assert moved(download_folder(URI, tmp_path / "back")) == (0, 2)
    assert held(tmp_path / "back") == held(here)


@pytest.mark.usefixtures("s3")
def test_hidden_files_stay_links_are_followed_and_what_is_there_alone_is_counted(tmp_path):
    here = write(tmp_path / "here", {"a/1": b"1", ".git/config": b"x", "a/.DS_Store": b"x"})
    (here / "linked").symlink_to(here / "a")
    (here / "a" / "back").symlink_to(here)  # a circle
    put("set one/old", b"old")
    assert set(files_in(here)) == {"a/1", "linked/1"}
    answer = upload_folder(here, URI)
    assert (answer.files, answer.others) == (2, 1)
    assert DIRECT[0].head_object(Bucket=BUCKET, Key="set one/old")


@pytest.mark.usefixtures("s3")
def test_folders_that_the_console_makes_are_no_files_and_mirroring_forgets_what_is_gone(tmp_path):
    put("set one/", b"")
    put("set one/a/", b"")
    put("set one/a/1", b"1")
    put("set two/2", b"2")  # no part of it, whatever its name begins with
    put("set one more", b"3")
    back = write(tmp_path / "back", {"a/1": b"1", "a/gone": b"0", "gone/too": b"0"})
    assert moved(download_folder(URI, back)) == (0, 1)
    assert len(held(back)) == 3
    download_folder(URI, back, mirror=True)
    assert held(back) == {"a/1": b"1"}
    assert not (back / "gone").exists()
    # Nothing there at all is rather a mistake than the wish to delete everything.
    assert moved(download_folder("s3://photos/nothing", back, mirror=True)) == (0, 0)
    assert held(back) == {"a/1": b"1"}


@pytest.mark.parametrize(
    "key",
    ["../out", "a/../../out", "/out", "a//out", "./out", "a\0b", ".."],
)
def test_no_key_leaves_the_folder(tmp_path, key):
    with pytest.raises(DataError, match="would leave the folder"):
        places(tmp_path / "folder", ["fine/1", key])


@pytest.mark.usefixtures("s3")
def test_a_hostile_key_is_refused_before_anything_is_written(tmp_path):
    put("set one/fine", b"1")
    put("set one/../../out", b"x")
    with pytest.raises(DataError, match="would leave the folder"):
        download_folder(URI, tmp_path / "a" / "back")
    assert held(tmp_path) == {}


def test_a_key_that_is_a_file_and_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="'a' is a file and a folder"):
        places(tmp_path, ["a", "a/b"])


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3:///key", "photos/set", "s3:photos", "s3://key:password@photos/x", "s3://ü/x"],
)
def test_what_is_no_place_on_s3_is_said_without_a_password(uri):
    with pytest.raises(DataError, match="is no place on S3; write s3://BUCKET/FOLDER") as caught:
        split_uri(uri)
    assert "password@" not in str(caught.value)


def test_names_that_no_key_can_have_are_refused(tmp_path):
    here = write(tmp_path / "here", {os.fsdecode(b"\xff.png"): b"1"})
    with pytest.raises(DataError, match="no UTF-8"):
        files_in(here)
    with pytest.raises(DataError, match="There is no folder"):
        files_in(tmp_path / "nowhere")


# Bad days


def outage(requests_lost: int, answer: tuple[int, str] | str = "close") -> Any:
    """Every request is lost until so many were."""
    left, lock = [requests_lost], threading.Lock()

    def rule(*_: object) -> tuple[int, str] | str | None:
        with lock:
            left[0] -= 1
        return answer if left[0] >= 0 else None

    return rule


@pytest.mark.parametrize("answer", ["close", (503, "SlowDown"), (500, "InternalError")])
def test_s3_that_is_away_for_a_while_is_asked_again(s3, tmp_path, answer):
    here, notes = write(tmp_path / "here"), []
    s3.rule = outage(12, answer)
    assert moved(upload_folder(here, URI, note=notes.append)) == (5, 0)
    s3.rule = outage(12, answer)
    assert moved(download_folder(URI, tmp_path / "back", note=notes.append)) == (5, 0)
    assert held(tmp_path / "back") == FILES
    assert notes
    assert all(note.startswith("S3 does not answer; asking again for") for note in notes)


@pytest.mark.slow
def test_s3_that_is_away_for_seconds_delays_transfers_and_no_more(s3, tmp_path, monkeypatch):
    """With the pauses that a user has; half a minute is well within what is waited for."""
    assert min(transfer_module.PATIENCE_SECONDS, transfer_module.FIRST_PATIENCE_SECONDS) > 30
    for module, name in ((transfer_module, "_LONGEST_PAUSE_SECONDS"), (s3_module, "ATTEMPTS")):
        monkeypatch.setattr(module, name, REAL[name])
    put("other/one.png", b"1")
    here, began = write(tmp_path / "here"), time.monotonic()
    s3.rule = lambda *_: "close" if time.monotonic() - began < 5 else None
    with ThreadPoolExecutor() as pool:
        up = pool.submit(upload_folder, here, URI)
        down = pool.submit(download_folder, f"s3://{BUCKET}/other", tmp_path / "other")
    assert moved(up.result()) == (5, 0)
    assert moved(down.result()) == (1, 0)
    assert held(tmp_path / "other") == {"one.png": b"1"}
    assert time.monotonic() - began >= 5


def test_s3_that_stays_away_ends_in_one_line_and_the_next_run_goes_on(s3, tmp_path, monkeypatch):
    here = write(tmp_path / "here")
    upload_folder(here, URI)
    monkeypatch.setattr(transfer_module, "PATIENCE_SECONDS", 0.1)
    s3.rule = lambda _method, path, _headers: "close" if "png" in path else None
    with pytest.raises(ServingError, match=r"Cannot read s3://photos: .*connection") as caught:
        download_folder(URI, tmp_path / "back")
    assert "\n" not in str(caught.value)
    s3.rule = lambda *_: None
    answer = download_folder(URI, tmp_path / "back")
    assert answer.files + answer.skipped == 5
    assert held(tmp_path / "back") == FILES
    s3.rule = lambda *_: "close"
    monkeypatch.setattr(transfer_module, "FIRST_PATIENCE_SECONDS", 0.1)
    with pytest.raises(ServingError, match="Cannot write to s3://photos"):
        upload_folder(here, URI)


def test_a_download_that_breaks_off_goes_on_where_it_was(s3, tmp_path):
    content = os.urandom(3 << 20)
    put("set one/large", content)
    asked: list[str | None] = []

    def watch(method: str, path: str, headers: Any) -> None:
        if method == "GET" and path.endswith("large"):
            asked.append(headers.get("Range"))

    s3.rule = watch
    s3.change = lambda _method, path, body: (
        body[: 2 << 20] if path.endswith("large") and len(asked) == 1 else body
    )
    steps: list[int] = []
    download_folder(URI, tmp_path / "back", progress=lambda done, _total: steps.append(done))
    assert held(tmp_path / "back") == {"large": content}
    assert asked == [None, f"bytes={2 << 20}-"]
    assert steps[-1] == len(content)


def test_half_a_file_of_a_killed_run_is_used_if_it_is_still_the_same_object(s3, tmp_path):
    content = os.urandom(3 << 20)
    put("set one/large", content)
    etag = hashlib.md5(content).hexdigest()
    name = hashlib.sha256(b"set one/large").hexdigest()[:24]
    half = tmp_path / "back" / INCOMING / f"{name}-{etag}"
    ranges: list[str | None] = []
    s3.rule = lambda _method, _path, headers: ranges.append(headers.get("Range"))

    write(half.parent, {half.name: content[:1000]})
    download_folder(URI, tmp_path / "back")
    assert "bytes=1000-" in ranges
    assert held(tmp_path / "back") == {"large": content}
    (tmp_path / "back" / "large").unlink()
    # Damaged in the middle: found out, and brought anew.
    write(half.parent, {half.name: b"x" * 1000})
    download_folder(URI, tmp_path / "back")
    assert held(tmp_path / "back") == {"large": content}
    (tmp_path / "back" / "large").unlink()
    # Complete, but not known to be right.
    write(half.parent, {half.name: b"x" * len(content)})
    download_folder(URI, tmp_path / "back")
    assert held(tmp_path / "back") == {"large": content}


def test_the_first_failure_ends_large_transfers_too(s3, tmp_path):
    large = os.urandom(2 * PART_BYTES)
    here = write(tmp_path / "here", {f"large {n}": large for n in range(6)} | {"a": b"1"})
    s3.rule = lambda _method, path, _headers: (403, "AccessDenied") if "/a" in path else None
    with pytest.raises(DataError, match="may not write to"):
        upload_folder(here, URI)
    (here / "a").unlink()
    assert sum(moved(upload_folder(here, URI))) == 6
    put("set one/a", b"1")
    with pytest.raises(DataError, match="may not read"):
        download_folder(URI, tmp_path / "back")
    s3.rule = lambda *_: None
    download_folder(URI, tmp_path / "back")
    assert held(tmp_path / "back") == {**held(here), "a": b"1"}


def test_damaged_bytes_are_not_kept(s3, tmp_path):
    upload_folder(write(tmp_path / "here", {"a": b"content"}), URI)
    broken = [2]

    def damage(method: str, path: str, body: bytes) -> bytes:
        if method == "GET" and path.endswith("/a") and broken[0]:
            broken[0] -= 1
            return b"CONTENT"
        return body

    s3.change = damage
    download_folder(URI, tmp_path / "back")
    assert held(tmp_path / "back") == {"a": b"content"}
    broken[0] = 99
    (tmp_path / "back" / "a").write_bytes(b"the old")
    with pytest.raises(DownloadError, match=r"'set one/a' came damaged from s3://photos"):
        download_folder(URI, tmp_path / "back")
    assert (tmp_path / "back" / "a").read_bytes() == b"the old"


@pytest.mark.parametrize("metadata", [{}, {"sha256": hashlib.sha256(b"content").hexdigest()}])
def test_objects_without_a_checksum_of_s3_are_checked_too(s3, tmp_path, metadata):
    put("set one/a", b"content", Metadata=metadata)
    s3.change = lambda _method, path, body: body if "list-type" in path else body.upper()
    with pytest.raises(DownloadError, match="came damaged"):
        download_folder(URI, tmp_path / "back")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", r"may not (read|write to) s3://photos. They need s3:ListBucket"),
        (403, "InvalidAccessKeyId", "does not take these credentials"),
        (403, "SignatureDoesNotMatch", "does not take these credentials"),
        (404, "NoSuchBucket", "There is no bucket 'photos'"),
        (400, "AuthorizationHeaderMalformed", "another region. Set AWS_REGION=eu-west-3"),
        (403, "InvalidObjectState", "Restore them first"),
        (400, "InvalidArgument", r"refuses to .* \(InvalidArgument\)"),
    ],
)
def test_what_s3_refuses_is_one_line_that_names_the_fix(s3, tmp_path, status, code, message):
    s3.rule = lambda *_: (status, code)
    for call in (
        lambda: download_folder(URI, tmp_path / "back"),
        lambda: upload_folder(write(tmp_path / "here"), URI),
    ):
        with pytest.raises((UserMistake, ServingError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        if code != "InvalidArgument":
            assert SECRET not in str(caught.value)


@pytest.mark.usefixtures("s3")
def test_no_credentials_are_said_in_one_line(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserMistake, match=r"No usable AWS credentials: .* Set AWS_PROFILE"):
        download_folder(URI, tmp_path / "back")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserMistake, match="nobody"):
        download_folder(URI, tmp_path / "back")


@pytest.mark.usefixtures("s3")
def test_a_password_in_the_endpoint_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_module, "FIRST_PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:1")
    with pytest.raises(ServingError, match=r"Cannot read s3://photos: .*127\.0\.0\.1") as caught:
        download_folder(URI, tmp_path / "back")
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("s3")
def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path, monkeypatch):
    upload_folder(write(tmp_path / "here"), URI)
    usage = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr(storage_module.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DataError, match="The disk is too small"):
            download_folder(URI, tmp_path / "back")
    whole = Path.open

    def full(path: Path, *arguments: Any, **more: Any) -> Any:
        if INCOMING in path.parts and arguments[0] in ("wb", "ab"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match="The disk is full"):
        download_folder(URI, tmp_path / "back")
    assert held(tmp_path / "back") == {}


# Where images and weights come from


def test_images_on_s3_are_fetched_once_and_then_what_changed(s3, tmp_path):
    upload_folder(write(tmp_path / "here"), URI)
    cache = tmp_path / "cache"
    folder = fetch_source(URI, cache=cache)
    assert folder.name == "set one"
    assert held(folder) == FILES
    before = s3.count("GET")
    assert fetch_source(f"{URI}/", cache=cache) == folder
    assert (s3.count("GET"), s3.count("HEAD")) == (before, 0)
    put("set one/train/a b/0.png", image("navy"))
    DIRECT[0].delete_object(Bucket=BUCKET, Key="set one/empty.txt")
    s3.seen.clear()
    fetch_source(URI, cache=cache)
    assert s3.count("GET") == 1
    assert held(folder)["train/a b/0.png"] == image("navy")
    assert "empty.txt" not in held(folder)


def test_what_came_whole_is_used_while_s3_is_away(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_module, "FIRST_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(transfer_module, "PATIENCE_SECONDS", 0.1)
    upload_folder(write(tmp_path / "here"), URI)
    cache, notes = tmp_path / "cache", []

    def fetch():
        return fetch_source(URI, cache=cache, note=notes.append)

    s3.rule = lambda *_: "close"
    with pytest.raises(ServingError, match="Cannot read s3://photos"):
        fetch()
    s3.rule = lambda *_: None
    folder = fetch()
    s3.rule = lambda *_: "close"
    assert fetch() == folder
    assert held(folder) == FILES
    assert notes[-1].startswith(f"S3 cannot be reached: the copy in {folder} is used, whole on ")
    s3.rule = lambda *_: (403, "AccessDenied")  # that is no outage
    with pytest.raises(DataError, match="may not read"):
        fetch()
    s3.rule = lambda *_: "close"
    (folder / "empty.txt").unlink()  # no whole copy any more
    with pytest.raises(ServingError, match="Cannot read s3://photos"):
        fetch()


def test_an_archive_on_s3_is_fetched_once_unpacked_and_checked(s3, tmp_path, monkeypatch):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bundle:
        for name, content in FILES.items():
            bundle.writestr(name, content)
    put("sets/dogs.zip", stream.getvalue())
    uri, cache = "s3://photos/sets/dogs.zip", tmp_path / "cache"
    folder = fetch_source(uri, cache=cache)
    assert held(folder) == FILES
    assert fetch_source(uri, cache=cache) == folder
    assert s3.count("GET") == 1
    with monkeypatch.context() as patch:
        patch.setattr(transfer_module, "FIRST_PATIENCE_SECONDS", 0.1)
        s3.rule = lambda *_: "close"
        assert fetch_source(uri, cache=cache) == folder
        s3.rule = lambda *_: None
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    assert fetch_source(uri, cache=cache, sha256=digest) == folder
    with pytest.raises(DataError, match=r"not 0000 as data\.sha256 says"):
        fetch_source(uri, cache=cache, sha256="0000")


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://photos/nothing", "There is nothing at s3://photos/nothing"),
        ("s3://photos", "There is nothing at s3://photos"),
        ("s3://photos/no.zip", "There is no object s3://photos/no.zip"),
        ("s3://elsewhere/set", "There is no bucket 'elsewhere'"),
        ("s3://me:hunter2@photos/set", "is no place on S3"),
        ("s33://photos/set", "Did you mean s3://"),
    ],
)
def test_images_that_are_not_on_s3_are_one_clear_line(tmp_path, uri, message):
    with pytest.raises(DataError, match=message) as caught:
        fetch_source(uri, cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_weights_on_s3_are_read_once_and_again_when_they_changed(s3, tmp_path):
    import torch
    from safetensors.torch import save

    from visiontuner.model.weights import read_weights

    put("nets/resnet.safetensors", save({"fc.bias": torch.ones(2)}))
    uri = "s3://photos/nets/resnet.safetensors"
    assert torch.equal(read_weights(uri, cache=tmp_path)["fc.bias"], torch.ones(2))
    read_weights(uri, cache=tmp_path)
    assert s3.count("GET") == 1
    put("nets/resnet.safetensors", save({"fc.bias": torch.zeros(2)}))
    assert torch.equal(read_weights(uri, cache=tmp_path)["fc.bias"], torch.zeros(2))
    with pytest.raises(DataError, match="There is no object"):
        read_weights("s3://photos/nets/other.pth", cache=tmp_path)


@pytest.mark.usefixtures("s3")
def test_prepare_brings_images_to_s3_and_looks_at_them_there(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))
    here = write(tmp_path / "here", {k: v for k, v in FILES.items() if k.endswith("png")})
    call = ["prepare", "--data", str(here), "--upload", "s3://photos/mine"]
    first, second = CliRunner().invoke(main, call), CliRunner().invoke(main, call)
    assert first.exit_code == second.exit_code == 0, first.output
    assert "Uploaded 4 files (0.0 MB) to s3://photos/mine; 0 were there already." in first.stdout
    assert "Uploaded 0 files (0.0 MB) to s3://photos/mine; 4 were there already." in second.stdout
    there = CliRunner().invoke(main, ["prepare", "--data", "s3://photos/mine"])
    assert there.exit_code == 0, there.output
    assert "große Hunde" in there.stdout
    rows = [",".join([name, *name.split("/")[1::-1]]) for name in FILES if name.endswith("png")]
    (here / "labels.csv").write_text("\n".join(["path,label,split", *rows]), "utf-8")
    call[2] = str(here / "labels.csv")
    table = CliRunner().invoke(main, call)
    assert "Uploaded 1 files" in table.stdout
    there = CliRunner().invoke(main, ["prepare", "--data", "s3://photos/mine/labels.csv"])
    assert there.exit_code == 0, there.output
    assert "große Hunde" in there.stdout
    wrong = CliRunner().invoke(main, [*call[:-1], "photos/mine"])
    assert wrong.exit_code == 2
    assert "is no place on S3" in wrong.stderr
