"""Tables of labels on a web server, and whole addresses in the tables of remote sources."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from visiontuner.data.dataset import fetch_source, load_dataset, source_address
from visiontuner.data.labels import path_below
from visiontuner.errors import DataError, DownloadError
from visiontuner.io import download as downloads


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the server has: two classes of ten images, names with blanks and accents."""
    root = tmp_path / "served" / "photos"
    rng = np.random.default_rng(8)
    for name in ("cat", "café au lait"):
        (root / name).mkdir(parents=True)
        for number in range(10):
            levels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / name / f"no {number}%41.png")
    return root


class Site:
    """A web server: what was asked of it, and what it answers instead."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[str] = []
        self.refused: dict[str, int] = {}  # part of a path -> status


@pytest.fixture
def site(root: Path) -> Iterator[Site]:
    site = Site()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root.parent))

        def do_GET(self) -> None:
            site.asked.append(self.path)
            for part, status in site.refused.items():
                if part in self.path:
                    self.send_error(status)
                    return
            super().do_GET()

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}/photos/labels.csv"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def write_table(root: Path, *more: str, prefix: str = "") -> None:
    paths = sorted(path.relative_to(root) for path in root.glob("*/*.png"))
    rows = [
        f"{prefix}{quote(path.as_posix()) if prefix else path.as_posix()},{path.parent.name}"
        for path in paths
    ]
    (root / "labels.csv").write_text("\n".join(["path,label", *rows, *more]), "utf-8")


def load(url: str, cache: Path, notes: list[str] | None = None) -> Any:
    note = (notes if notes is not None else []).append
    folder = fetch_source(url, cache=cache, note=note)
    return load_dataset(folder, address=source_address(url), cache=cache)


@pytest.mark.parametrize("form", ["relative", "whole", "whole with a query"])
def test_a_table_on_a_web_server_is_the_same_data_set_as_its_folder(root, site, cache, form):
    before = load_dataset(root, cache=cache)
    folder = site.url.rpartition("/")[0] + "/"
    write_table(root, prefix="" if form == "relative" else folder)
    if form == "whole with a query":
        text = (root / "labels.csv").read_text("utf-8").replace(".png,", ".png?token=abc,")
        (root / "labels.csv").write_text(text, "utf-8")
    dataset = load(site.url, cache)
    assert dataset.digest == before.digest
    assert dataset.findings == ()
    assert dataset.described == "labels.csv: 20 images, 2 classes"
    asked = Counter(path.partition("?")[0] for path in site.asked)
    assert len(asked) == 21
    assert set(asked.values()) == {1}
    assert all(("token=abc" in path) == ("query" in form) for path in site.asked if "png" in path)


def test_what_changes_on_the_server_is_noticed_and_what_goes_is_left_out(root, site, cache):
    write_table(root)
    before = load(site.url, cache)
    assert load(site.url, cache) == before
    changed, gone = root / "cat" / "no 3%41.png", root / "cat" / "no 4%41.png"
    Image.new("RGB", (5, 5), "red").save(changed)
    os.utime(changed, (2e9, 2e9))  # the server tells times in seconds
    gone.unlink()
    notes: list[str] = []
    after = load(site.url, cache, notes)
    assert after.digest == load_dataset(root / "labels.csv", cache=cache).digest != before.digest
    assert [finding.rule for finding in after.findings][:1] == ["rows_without_file"]
    assert notes[0].startswith("1 images are not on the server, or not given: Cannot fetch http://")


def test_images_that_came_are_used_while_the_server_is_away(root, site, cache, monkeypatch):
    monkeypatch.setattr(downloads, "_BACKOFF_SECONDS", ())
    write_table(root)
    before = load(site.url, cache)
    site.refused[""] = 503
    assert load(site.url, cache) == before
    with pytest.raises(DownloadError, match=r"labels\.csv broke off: the server answered 503"):
        load(site.url, cache / "other")


def test_a_server_that_fails_for_one_image_ends_the_command_in_one_line(
    root, site, cache, monkeypatch
):
    monkeypatch.setattr(downloads, "_BACKOFF_SECONDS", ())
    write_table(root)
    site.refused["no%203"] = 500
    with pytest.raises(DownloadError, match=r"no%203%2541\.png broke off: .* 500 .*goes on where"):
        load(site.url, cache)


def test_rows_that_leave_the_tables_folder_are_never_asked_for(root, site, cache):
    other = "http://localhost:1/photos/x.png"
    host = site.url.removesuffix("photos/labels.csv")
    rows = [
        f"{other}?token=hush,cat",
        f"{host}secret/x.png,cat",
        f"{host}photos/%2e%2e/secret/x.png,cat",
        "../secret/x.png,cat",
        "s3://bucket/x.png,cat",
        "file:///etc/x.png,cat",
        "http://[,cat",
    ]
    write_table(root, *rows)
    dataset = load(site.url, cache)
    (finding,) = dataset.findings
    assert finding.rule == "rows_outside_the_folder"
    assert len(finding.items) == len(rows)
    assert finding.items[0] == f"line 22: {other}?token=***"
    assert not [path for path in site.asked if "secret" in path or "x.png" in path]
    assert len(dataset.splits["train"]) == 16


def test_a_broken_table_on_a_web_server_is_one_line(root, site, cache):
    (root / "labels.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column 'path', only 'a', 'b'; name it with"):
        load(site.url, cache)


@pytest.mark.parametrize(
    ("folder", "address", "path"),
    [
        ("https://h/a/", "https://h/a/b/c.png", "b/c.png"),
        ("https://h/a/", "HTTPS://H:443/a/c%20d.png?sig=1#x", "c d.png"),
        ("https://me:pw@h/a/", "https://h/a/c.png", "c.png"),
        ("https://h/a b/", "https://h/a%20b/c.png", "c.png"),
        ("https://h/a/", "http://h/a/c.png", None),
        ("https://h/a/", "https://h:8443/a/c.png", None),
        ("https://h/a/", "https://h.evil/a/c.png", None),
        ("https://h/a/", "https://h@evil/a/c.png", None),
        ("https://h/a/", "https://h/ab/c.png", None),
        ("https://h/a/", "https://h:port/a/c.png", None),
        ("s3://b/a/", "s3://b/a/c%20d?.png", "c%20d?.png"),
        ("s3://b/a/", "S3://b/a/c.png", "c.png"),
        ("s3://b/a/", "s3://b2/a/c.png", None),
        ("s3://b/a/", "s3://b/ab/c.png", None),
        ("s3://b/a/", "https://b/a/c.png", None),
        ("https://b/a/", "s3://b/a/c.png", None),
    ],
)
def test_what_lies_below_an_address(folder, address, path):
    assert path_below(folder, address) == path


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("s3://b/x/labels.csv", "s3://b/x/"),
        ("s3://b/x", "s3://b/x/"),
        ("s3://b/x.zip", ""),
        ("https://h/x/labels.csv?sig=1", "https://h/x/"),
        ("https://h/x.zip", ""),
        ("photos/labels.csv", ""),
        ("digits", ""),
    ],
)
def test_the_address_of_a_sources_folder(source, address):
    assert source_address(source) == address
