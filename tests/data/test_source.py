"""Where images come from: folders, archives, web servers and the built-in digits."""

import concurrent.futures
import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from visiontuner.data.dataset import archive_findings, fetch_source, load_dataset, write_digits
from visiontuner.errors import DataError, DownloadError
from visiontuner.io import download as archive_module
from visiontuner.io import download as download_module


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download_module, "_BACKOFF_SECONDS", (0.0, 0.0))


def image(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG")
    return stream.getvalue()


FILES = {
    "photos/train/a/0.png": image("red"),
    "photos/train/b/0.png": image("blue"),
    "photos/valid/a/0.png": image("lime"),
    "photos/valid/b/0.png": image("gray"),
}


def zipped(files: dict[str, bytes] = FILES) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return stream.getvalue()


def tarred(mode: str, files: dict[str, bytes] = FILES, *members: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as bundle:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            bundle.addfile(member, io.BytesIO(content))
        for member in members:
            bundle.addfile(member)
    return stream.getvalue()


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


class Site:
    """A web server with one file and everything that can go wrong with it."""

    def __init__(self) -> None:
        self.content = zipped()
        self.etag: str | None = '"1"'
        self.ranges = True
        self.cut_after: list[int] = []  # bytes after which each coming answer breaks off
        self.failures: list[int] = []  # statuses of the coming answers
        self.requests: list[dict[str, str]] = []
        self.sent: list[int] = []


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requests.append(dict(self.headers))
            if site.failures:
                self.send_error(site.failures.pop(0))
                return
            if site.etag and self.headers.get("If-None-Match") == site.etag:
                self.send_response(304)
                self.end_headers()
                return
            self._send(*self._start())

        def _start(self) -> tuple[int, int]:
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked and site.ranges and self.headers.get("If-Range") == site.etag:
                return int(asked[1]), 206
            return 0, 200

        def _send(self, start: int, status: int) -> None:
            body = site.content[start:]
            self.send_response(416 if start >= len(site.content) else status)
            self.send_header("Content-Length", str(len(body)))
            if site.etag:
                self.send_header("ETag", site.etag)
            if status == 206:
                end = len(site.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(site.content)}")
            self.end_headers()
            cut = site.cut_after.pop(0) if site.cut_after else len(body)
            self.wfile.write(body[:cut])
            site.sent.append(min(cut, len(body)))

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}/some/photos.zip"
    site.stop = server.shutdown
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_is_used_where_it_is(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    assert fetch_source(str(tmp_path / "photos"), cache=cache) == tmp_path / "photos"
    assert fetch_source("~/photos", cache=cache) == tmp_path / "photos"
    assert fetch_source(f"file://{tmp_path}/photos", cache=cache) == tmp_path / "photos"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.zip", zipped()),
        ("p.tar", tarred("w")),
        ("p.tar.gz", tarred("w:gz")),
        ("p.tgz", tarred("w:gz")),
        ("p.tar.bz2", tarred("w:bz2")),
        ("p.tar.xz", tarred("w:xz")),
    ],
)
def test_archives_are_unpacked_once(tmp_path, cache, name, content):
    source = write(tmp_path / name, content)
    folder = fetch_source(source, cache=cache)
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    assert found == FILES
    assert load_dataset(folder, cache=cache).class_names == ("a", "b")
    before = (folder / "photos/train/a/0.png").stat().st_mtime_ns
    assert fetch_source(source, cache=cache) == folder
    assert (folder / "photos/train/a/0.png").stat().st_mtime_ns == before
    write(tmp_path / name, zipped({"x/y.png": b"other"}))
    assert fetch_source(source, cache=cache) != folder


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_link() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bundle:
        info = zipfile.ZipInfo("a/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        bundle.writestr(info, "/etc")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", zipped({"../escaped.png": b"x"})),
        ("a.zip", zipped({"a/../../escaped.png": b"x"})),
        ("a.zip", zipped({"/tmp/escaped.png": b"x"})),
        ("a.zip", zipped({"..\\escaped.png": b"x"})),
        ("a.zip", zipped({"C:\\escaped.png": b"x"})),
        ("a.zip", zip_link()),
        ("a.tar", tarred("w", {}, member("../escaped.png"))),
        ("a.tar", tarred("w", {}, member("/tmp/escaped.png"))),
        ("a.tar", tarred("w", {}, member("link", tarfile.SYMTYPE, "/etc"))),
        ("a.tar", tarred("w", {}, member("link", tarfile.SYMTYPE, ".."))),
        ("a.tar", tarred("w", {}, member("link", tarfile.LNKTYPE, "../../secret"))),
        ("a.tar", tarred("w", {}, member("device", tarfile.CHRTYPE))),
        ("a.tar", tarred("w", {}, member("pipe", tarfile.FIFOTYPE))),
    ],
)
def test_nothing_leaves_the_target_folder(tmp_path, cache, name, content):
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match="is refused: its entry"):
        fetch_source(source, cache=cache)
    assert list(tmp_path.rglob("*escaped*")) == []
    assert not Path("/tmp/escaped.png").exists()
    assert list((cache / "archives").iterdir()) == []


def sparse_tar() -> bytes:
    """2 kB that GNU tar's `--sparse` writes for 40 GB of nothing."""
    info = tarfile.TarInfo("a/1.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    struct.pack_into("12s12s", header, 386, b"%011o\0" % (40 << 30), b"%011o\0" % 0)
    struct.pack_into("12s", header, 483, b"\x80" + (40 << 30).to_bytes(11, "big"))
    return checked(header) + bytes(1024)


def checked(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_sparse_tar() -> bytes:
    info = tarfile.TarInfo("a/1.png")
    info.pax_headers = {"GNU.sparse.size": str(40 << 30), "GNU.sparse.numblocks": "0"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as bundle:
        bundle.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize("content", [sparse_tar(), pax_sparse_tar()], ids=["gnu", "pax"])
def test_a_sparse_tar_is_refused(tmp_path, cache, content):
    assert len(content) <= 10_240
    with pytest.raises(DataError, match=r"is refused: its entry 'a/1\.png' is a sparse file"):
        fetch_source(write(tmp_path / "a.tar", content), cache=cache)


def tar_header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo("a/1.png")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_header(40 << 30) + bytes(2048), "is damaged|The disk is full"),
        (tar_header(1 << 30) + bytes(2048), "is damaged: unexpected end of data"),
        (tar_header(-1024) + bytes(2048), "is damaged"),
        (gzip.compress(tar_header(-1024) + bytes(2048)), "is damaged"),
        (gzip.compress(tar_header(64 << 20, b"x") + bytes(64 << 20)), "is damaged: a h"),
        (gzip.compress(tar_header(64 << 20, b"L") + bytes(64 << 20)), "is damaged: a h"),
    ],
    ids=["40 GB", "1 GB", "negative", "negative gz", "large header", "long name"],
)
def test_a_tar_that_declares_what_it_does_not_hold_is_refused(tmp_path, cache, content, message):
    with pytest.raises(DataError, match=message):
        fetch_source(write(tmp_path / "a.tar", content), cache=cache)
    assert list((cache / "archives").iterdir()) == []


def test_an_archive_within_an_archive_stays_one(tmp_path, cache):
    inner = gzip.compress(tarred("w", {"x/zeros.png": bytes(1 << 20)}))
    source = write(
        tmp_path / "a.tar.gz", tarred("w:gz", FILES | {"photos/train/a/b.tar.gz": inner})
    )
    folder = fetch_source(source, cache=cache)
    assert (folder / "photos/train/a/b.tar.gz").read_bytes() == inner
    assert not list(folder.rglob("zeros.png"))


def test_a_colon_in_a_folders_name_is_no_drive(tmp_path, cache):
    entries = {f"photos: summer/{name}/1.png": b"x" for name in "ab"}
    for name, content in {"a.zip": zipped(entries), "b.tar": tarred("w", entries)}.items():
        folder = fetch_source(write(tmp_path / name, content), cache=cache)
        assert (folder / "photos: summer" / "a" / "1.png").read_bytes() == b"x"


def old_zip(names: list[bytes], extra: bytes = b"") -> bytes:
    """A zip as programs wrote it before names were UTF-8: bytes, and no word on what they mean."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bundle:
        for number, name in enumerate(names):
            info = zipfile.ZipInfo(f"{number:02d}".ljust(len(name), "~"))
            info.extra = extra
            bundle.writestr(info, image(f"#{number:06x}"))
    content = stream.getvalue()
    for number, name in enumerate(names):
        content = content.replace(f"{number:02d}".ljust(len(name), "~").encode(), name)
    return content


def unpacked_classes(tmp_path: Path, content: bytes, suffix: str = "zip") -> set[str]:
    folder = fetch_source(write(tmp_path / f"a.{suffix}", content), cache=tmp_path / "cache")
    return {path.parent.name for path in folder.rglob("*.png")}


def names_warned_of(tmp_path: Path) -> list[str]:
    (folder,) = (tmp_path / "cache" / "archives").iterdir()
    return [finding.evidence for finding in archive_findings(folder)]


@pytest.mark.parametrize(
    ("encoding", "classes", "warned"),
    [
        ("utf-8", {"Füchse", "猫"}, False),
        ("cp437", {"Füchse", "Löwen"}, False),  # a zip without a word is cp437
        ("cp850", {"leões", "Ácaros"}, True),
        ("cp1252", {"Füchse", "Käfer"}, True),
        ("cp866", {"кошка", "собака"}, True),
        ("cp1251", {"кошка", "собака"}, True),
        ("cp932", {"イヌ", "ネコ"}, True),
        ("cp932", {"表", "ソ"}, True),  # the second byte of each is a backslash
        ("gbk", {"狗", "猫"}, True),
        ("gbk", {"誠", "乗"}, True),
        ("cp950", {"功", "許"}, True),
        ("cp949", {"개", "고양이"}, True),
    ],
)
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_class_names_are_read_in_the_encoding_that_fits(
    tmp_path, encoding, classes, warned, suffix
):
    names = [f"photos/{split}/{name}/1.png" for name in classes for split in ("train", "valid")]
    raw = [name.encode(encoding) for name in names]
    content = old_zip(raw) if suffix == "zip" else old_tar(raw)
    assert unpacked_classes(tmp_path, content, suffix) == classes
    warnings = names_warned_of(tmp_path)
    assert bool(warnings) == warned
    if warned:
        assert f"4 of them were read as {encoding} (" in warnings[0]
        assert min(classes) in warnings[0]


def old_tar(names: list[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", encoding="utf-8", errors="surrogateescape"
    ) as bundle:
        for number, name in enumerate(names):
            content = image(f"#{number:06x}")
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_a_guessed_encoding_is_said_whenever_the_data_set_is_read(tmp_path, cache):
    names = [f"{s}/{c}/1.png".encode("gbk") for s in ("train", "valid") for c in "狗猫"]
    source = write(tmp_path / "a.zip", old_zip(names))
    for _ in range(2):  # unpacked, and found unpacked
        dataset = load_dataset(fetch_source(source, cache=cache), cache=cache)
        assert dataset.class_names == ("狗", "猫")
        (finding,) = (f for f in dataset.findings if f.rule == "names_without_encoding")
        assert finding.severity == "warning"
        assert "read as gbk (狗, 猫)" in finding.evidence


def test_the_unicode_name_beside_an_old_one_wins_where_it_belongs_to_it(tmp_path):
    raw = "?/1.png".encode("cp437")
    name = "Füchse/1.png".encode()
    for checksum, expected in ((zlib.crc32(raw), "Füchse"), (zlib.crc32(raw) ^ 1, "?")):
        field = struct.pack("<BL", 1, checksum) + name
        content = old_zip([raw], struct.pack("<HH", 0x7075, len(field)) + field)
        (tmp_path / expected).mkdir()
        assert unpacked_classes(tmp_path / expected, content) == {expected}


def test_names_in_no_known_encoding_are_kept_apart_and_said(tmp_path):
    raw = [b"\xfe\x81\\/1.png", b"\xfe\x82\\/1.png"]
    assert len(unpacked_classes(tmp_path, old_zip(raw))) == 2
    assert "read as cp437" in names_warned_of(tmp_path)[0]


def test_folders_that_a_windows_program_parted_with_backslashes_are_folders(tmp_path):
    assert unpacked_classes(tmp_path, old_zip([b"train\\a\\1.png", b"train\\b\\1.png"])) == {
        "a",
        "b",
    }


@pytest.mark.parametrize(
    "names", [["a/1.png", "a/1.png"], ["a/1.png", "a/./1.png"], ["a/1.png", "a\\1.png"]]
)
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_two_entries_with_one_name_are_an_error(tmp_path, cache, names, suffix):
    raw = [name.encode() for name in names]
    source = write(tmp_path / f"a.{suffix}", old_zip(raw) if suffix == "zip" else old_tar(raw))
    with pytest.raises(DataError, match=r"is refused: its entry .* is there twice"):
        fetch_source(source, cache=cache)
    assert list((cache / "archives").iterdir()) == []


def test_a_folder_may_be_there_twice(tmp_path, cache):
    source = write(tmp_path / "a.tar", tarred("w", FILES, *[member("photos", tarfile.DIRTYPE)] * 2))
    assert fetch_source(source, cache=cache).is_dir()


GZ = tarred("w:gz", {"a/noise.png": os.urandom(50_000)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"<html>sign in</html>", "web page"),
        ("a.zip", b"", r"not an archive that can be read \([^;]*\)\.$"),
        ("a.zip", zipped()[:-30], "damaged: its end is missing. Fetch it again"),
        ("a.tar.gz", GZ[:12], "damaged"),
        ("a.tar.gz", GZ[: len(GZ) // 2], "damaged"),
        ("a.tar.gz", GZ[:30_000] + bytes(1000) + GZ[31_000:], "damaged"),
        ("a.zip", zipped().replace(image("blue"), bytes(len(image("blue")))), "damaged"),
    ],
    ids=[
        "web page",
        "empty",
        "zip cut short",
        "beginning",
        "half",
        "bit rot",
        "zip with a wrong checksum",
    ],
)
def test_damaged_archives_are_one_clear_line(tmp_path, cache, name, content, message):
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        fetch_source(source, cache=cache)
    assert "\n" not in str(caught.value)
    assert list((cache / "archives").iterdir()) == []


def test_an_encrypted_archive_is_one_clear_line(tmp_path, cache):
    content = bytearray(zipped({"a.png": b"x"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch_source(write(tmp_path / "a.zip", bytes(content)), cache=cache)


def test_a_full_disk_is_one_clear_line(tmp_path, cache, monkeypatch):
    def full(path: Path, content: object) -> None:
        del path, content
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write(tmp_path / "a.tar", tarred("w"))
    monkeypatch.setattr(archive_module, "_write", full)
    with pytest.raises(DataError, match="The disk is full"):
        fetch_source(source, cache=cache)
    assert list((cache / "archives").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.zip", zipped()), ("a.tar", tarred("w")), ("a.tar.xz", tarred("w:xz"))],
)
def test_an_archive_larger_than_the_disk_is_refused_beforehand(
    tmp_path, cache, monkeypatch, name, content
):
    source = write(tmp_path / name, content)
    usage = type("Usage", (), {"free": 200})
    monkeypatch.setattr(archive_module, "_write", None)  # nothing is begun
    monkeypatch.setattr(archive_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="The disk is full"):
        fetch_source(source, cache=cache)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("htps://example.org/a.zip", "Did you mean https://"),
        ("gopher://example.org/a.zip", "unknown scheme"),
        ("digit", "Did you mean digits"),
        ("no/such/folder", "There is no data at"),
        ("http://[bad/a.zip", "not a web address"),
        ("file://photos/dogs", "on the machine photos: .* file:///photos/dogs"),
    ],
)
def test_sources_that_cannot_be_used_are_one_clear_line(cache, source, message):
    with pytest.raises(DataError, match=message) as caught:
        fetch_source(source, cache=cache)
    assert "\n" not in str(caught.value)


def test_a_file_address_is_percent_decoded(tmp_path, cache):
    folder = tmp_path / "my photos [50%]"
    folder.mkdir()
    assert "%20" in folder.as_uri()
    assert fetch_source(folder.as_uri(), cache=cache) == folder
    assert (
        fetch_source(folder.as_uri().replace("file://", "file://localhost"), cache=cache) == folder
    )


def test_a_misspelt_folder_is_met_with_its_neighbour(tmp_path, cache):
    (tmp_path / "dogs24").mkdir()
    with pytest.raises(DataError, match=r"Did you mean .*dogs24\?"):
        fetch_source(str(tmp_path / "dogs42"), cache=cache)
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        fetch_source(write(tmp_path / "notes.txt", b"x"), cache=cache)


def test_a_local_archive_must_have_the_checksum(tmp_path, cache):
    source = write(tmp_path / "a.zip", zipped())
    digest = hashlib.sha256(zipped()).hexdigest()
    assert fetch_source(source, cache=cache, sha256=digest.upper()).is_dir()
    with pytest.raises(DataError, match="SHA-256"):
        fetch_source(source, cache=cache, sha256="0" * 64)


def test_a_download_is_unpacked_and_used_again(site, cache):
    seen: list[tuple[int, int]] = []
    folder = fetch_source(site.url, cache=cache, progress=lambda *x: seen.append(x))
    assert (folder / "photos/train/a/0.png").read_bytes() == image("red")
    assert seen[-1] == (len(site.content), len(site.content))
    assert fetch_source(site.url, cache=cache) == folder
    assert site.sent == [len(site.content)]  # the second answer was 304


def test_a_changed_download_is_fetched_again(site, cache):
    folder = fetch_source(site.url, cache=cache)
    site.content, site.etag = zipped({"new/a/0.png": b"x"}), '"2"'
    assert fetch_source(site.url, cache=cache) != folder


def test_with_a_checksum_the_server_is_not_asked_again(site, cache):
    digest = hashlib.sha256(site.content).hexdigest()
    folder = fetch_source(site.url, cache=cache, sha256=digest)
    assert fetch_source(site.url, cache=cache, sha256=digest) == folder
    assert len(site.requests) == 1


def test_a_kept_archive_that_is_damaged_is_fetched_again_before_it_is_unpacked(site, cache):
    folder = fetch_source(site.url, cache=cache)
    shutil.rmtree(folder)
    (kept,) = (cache / "downloads").rglob("photos.zip")
    content = kept.read_bytes()
    kept.write_bytes(content[:40].ljust(len(content), b"\0"))
    assert fetch_source(site.url, cache=cache) == folder
    assert kept.read_bytes() == content


def test_the_earlier_copy_serves_while_the_server_is_away(site, cache):
    folder = fetch_source(site.url, cache=cache)
    site.failures = [503]
    assert fetch_source(site.url, cache=cache) == folder


def test_a_broken_download_goes_on_where_it_stopped(site, cache):
    site.content = zipped({"photos/noise.bin": os.urandom(5_000_000)})
    site.cut_after = [3_000_000, 1_000_000]
    fetch_source(site.url, cache=cache)
    assert [r.get("Range") for r in site.requests] == [
        None,
        "bytes=3000000-",
        "bytes=4000000-",
    ]
    assert sum(site.sent) == len(site.content)


def test_a_later_call_goes_on_where_an_earlier_one_was_given_up(site, cache):
    site.cut_after = [200]
    site.content = zipped({"photos/noise.bin": os.urandom(5_000)})
    with pytest.raises(KeyboardInterrupt):
        fetch_source(site.url, cache=cache, progress=_interrupt)
    folder = fetch_source(site.url, cache=cache)
    assert (folder / "photos/noise.bin").stat().st_size == 5_000
    assert site.requests[-1]["Range"] == "bytes=200-"


def test_a_file_that_changed_meanwhile_is_started_anew(site, cache):
    site.cut_after = [200]
    with pytest.raises(KeyboardInterrupt):
        fetch_source(site.url, cache=cache, progress=_interrupt)
    site.content, site.etag = zipped({"new/a.png": b"x" * 999}), '"2"'
    assert (fetch_source(site.url, cache=cache) / "new/a.png").read_bytes() == b"x" * 999


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag": None}], ids=str)
def test_servers_that_cannot_resume_are_asked_for_the_whole_file(site, cache, change):
    vars(site).update(change)
    site.cut_after = [200]
    folder = fetch_source(site.url, cache=cache)
    assert (folder / "photos/train/b/0.png").read_bytes() == image("blue")
    assert site.sent == [200, len(site.content)]


def test_a_busy_server_is_asked_again(site, cache):
    site.failures = [503, 429]
    assert fetch_source(site.url, cache=cache).is_dir()
    assert len(site.requests) == 3


def test_a_connection_that_keeps_breaking_ends_in_one_clear_line(site, cache):
    site.failures = [503] * 9
    with pytest.raises(DownloadError, match="goes on where it stopped") as caught:
        fetch_source(site.url, cache=cache)
    assert "\n" not in str(caught.value)


def test_a_missing_page_is_one_clear_line_without_secrets(site, cache):
    site.failures = [404]
    with pytest.raises(DownloadError, match="answered 404") as caught:
        fetch_source(site.url.replace("http://", "http://me:secret@") + "?token=x", cache=cache)
    assert "secret" not in str(caught.value)
    assert "token=x" not in str(caught.value)
    assert len(site.requests) == 1


def test_a_server_that_is_not_there_is_one_clear_line(cache):
    with pytest.raises(DownloadError, match="refused"):
        fetch_source("http://127.0.0.1:9/a.zip", cache=cache)


def test_a_wrong_checksum_is_refused_and_forgotten(site, cache):
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch_source(site.url, cache=cache, sha256="0" * 64)
    assert fetch_source(site.url, cache=cache).is_dir()


def _interrupt(done: int, total: int) -> None:
    del done, total
    raise KeyboardInterrupt


def test_digits_are_a_balanced_data_set_of_their_own(cache):
    dataset = load_dataset(fetch_source("digits", cache=cache), cache=cache)
    assert dataset.class_names == tuple("0123456789")
    sizes = {split: len(samples) for split, samples in dataset.splits.items()}
    assert sizes == {"train": 1439, "validation": 179, "test": 179}
    assert all(17 <= n <= 18 for s in ("validation", "test") for n in dataset.counts(s))
    assert dataset.findings == ()
    with Image.open(dataset.root / dataset.splits["train"][0].path) as image:
        assert (image.size, image.mode) == ((32, 32), "L")


def test_digits_written_by_several_callers_at_once_are_whole(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(write_digits, [tmp_path] * 2))
    assert folders[0] == folders[1]
    assert len(list(folders[0].rglob("*.png"))) == 1797
    assert [p.name for p in folders[0].parent.iterdir()] == [folders[0].name]


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="Cannot write"):
        fetch_source("digits", cache=tmp_path / "file")
    with pytest.raises(DataError, match="Cannot write"):
        fetch_source("http://127.0.0.1:9/a.zip", cache=tmp_path / "file")
