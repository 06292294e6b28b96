"""What a look at every image finds, and what it leaves alone."""

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from visiontuner.data import findings as inspection
from visiontuner.data.dataset import load_dataset
from visiontuner.data.findings import SizeRange, inspect_dataset, near_pairs, summarise
from visiontuner.errors import VisiontunerError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def scene(seed: int, side: int = 96) -> Image.Image:
    """Smooth random shapes: like a photograph, most of it lies in the low frequencies."""
    levels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes in three splits, 8 different images, nothing wrong with them."""
    root = tmp_path / "images"
    seed = 0
    for split, number in (("train", 2), ("valid", 1), ("test", 1)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                scene(seed := seed + 1).save(root / split / name / f"{index}.jpg")
    return root


def found(root: Path, cache: Path) -> dict[str, str]:
    dataset = load_dataset(root, cache=cache)
    findings = inspect_dataset(dataset, workers=1, cache=cache)
    assert all("\n" not in f.evidence + f.advice for f in findings)
    return {finding.rule: finding.evidence for finding in findings}


def test_a_clean_data_set_has_no_findings(root, cache):
    assert found(root, cache) == {}


def test_a_class_that_loses_many_images_is_counted(root, cache):
    for number in range(10, 18):
        scene(number).save(root / "train" / "b" / f"{number}.jpg")
    for number in (10, 11):
        (root / "train" / "b" / f"{number}.jpg").write_bytes(b"no image")
    found = inspect_dataset(load_dataset(root, cache=cache), workers=1, cache=cache)
    (finding,) = [f for f in found if f.rule == "classes_with_many_unreadable_images"]
    assert finding.severity == "warning"
    assert finding.items == ("class b: 2 of 10",)
    assert finding.evidence.endswith(": a fifth or more of their train images cannot be read")


def test_a_class_whose_images_of_a_split_are_all_unreadable_is_found(root, cache):
    for path in (root / "train" / "a").iterdir():
        path.write_bytes(b"no image")
    (root / "test" / "b" / "0.jpg").write_bytes(b"no image")
    (root / "train" / "b" / "0.jpg").write_bytes(b"no image")  # another is left
    found = inspect_dataset(load_dataset(root, cache=cache), workers=1, cache=cache)
    emptied = [
        (f.severity, f.evidence) for f in found if f.rule == "classes_without_readable_images"
    ]
    assert emptied == [
        ("error", "1 (a): none of their train images can be read"),
        ("warning", "1 (b): none of their test images can be read"),
    ]


def test_every_rule_names_its_image(root, cache):
    train = root / "train"
    (train / "a" / "half.jpg").write_bytes((train / "a" / "0.jpg").read_bytes()[:700])
    scene(50, side=31).save(train / "a" / "small.png")
    scene(51).save(train / "a" / "really.png", "JPEG")
    shutil.copy(train / "a" / "0.jpg", train / "b" / "copy.jpg")
    shutil.copy(train / "a" / "1.jpg", root / "test" / "a" / "copy.jpg")
    with Image.open(train / "b" / "0.jpg") as image:
        image.resize((70, 70)).save(root / "valid" / "b" / "smaller.jpg", quality=60)
    evidence = found(root, cache)
    assert set(evidence) == {
        "unreadable_images",
        "tiny_images",
        "wrong_extensions",
        "same_image_in_two_classes",
        "same_image_in_two_splits",
        "near_duplicates_in_two_splits",
    }
    assert evidence["unreadable_images"].startswith("1 (train/a/half.jpg: image file is trunc")
    assert evidence["tiny_images"].startswith("1 (train/a/small.png)")
    assert evidence["wrong_extensions"].startswith("1 (train/a/really.png is JPEG)")
    assert evidence["same_image_in_two_classes"].startswith("1 (train/a/0.jpg = train/b/copy.jpg)")
    assert evidence["same_image_in_two_splits"].startswith("1 (train/a/1.jpg = test/a/copy.jpg)")
    assert evidence["near_duplicates_in_two_splits"].startswith(
        "1 (train/b/0.jpg ~ valid/b/smaller.jpg)"
    )


def test_nearly_the_same_image_in_two_groups_is_found(root, cache):
    for split, number in (("train", 0), ("train", 1), ("valid", 0), ("test", 0)):
        (root / split / "a" / f"{number}.jpg").rename(root / split / "a" / f"{split}{number}_1.jpg")
    with Image.open(root / "train/a/train0_1.jpg") as image:
        image.save(root / "train/a/train0_2.jpg", quality=50)  # of its own group
        image.save(root / "train/a/other_1.jpg", quality=60)
    dataset = load_dataset(root, group=r"(.*)_\d", cache=cache)
    findings = inspect_dataset(dataset, workers=1, cache=cache)
    (finding,) = [f for f in findings if f.rule == "near_duplicates_in_two_groups"]
    assert all("other_1.jpg" in item and "train0_" in item for item in finding.items)
    assert finding.severity == "warning"


def test_images_that_decode_to_nearly_black_are_found(root, cache):
    """12 bits in a file of 16 that does not say so: nobody can know, but anybody can be told."""
    levels = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    Image.fromarray(levels).save(root / "train/a/dark.png")
    Image.fromarray(levels.astype(np.uint16) * 16).save(root / "train/a/scaled.png")
    Image.fromarray(np.full((64, 64), 3.0, np.float32)).save(root / "train/b/float.tiff")
    evidence = found(root, cache)
    assert evidence["few_levels"].startswith("1 (train/a/dark.png): nearly black, white or")
    assert "values from 3 to 3, and 0 to 1 is read" in evidence["unreadable_images"]


def test_nearly_the_same_image_within_one_split_is_no_finding(root, cache):
    with Image.open(root / "train/a/0.jpg") as image:
        image.save(root / "train/a/again.jpg", quality=50)
        image.filter(ImageFilter.GaussianBlur(1)).save(root / "train/a/soft.jpg")
    assert found(root, cache) == {}


def test_many_blank_images_are_one_finding(root, cache):
    for level in range(1, 20):
        Image.new("RGB", (64, 64), (level, level, level)).save(root / f"train/a/blank{level}.png")
        Image.new("L", (65, 65), 100 + level).save(root / f"test/a/blank{level}.png")
    assert found(root, cache)["near_duplicates_in_two_splits"].startswith("1 (train/a/blank")


@pytest.mark.parametrize(("number", "fires"), [(18, False), (19, True)])
def test_imbalance_begins_above_ten_to_one(root, cache, number, fires):
    for index in range(number):
        scene(100 + index, side=40).save(root / "train" / "a" / f"more{index}.png")
    evidence = found(root, cache)  # 20 or 21 images of a, 2 of b
    assert ("class_imbalance" in evidence) == fires
    if fires:
        assert evidence["class_imbalance"] == "a has 21 training images, b has 2"


def test_a_second_look_decodes_only_what_is_new(root, cache, monkeypatch):
    dataset = load_dataset(root, cache=cache)
    first = inspect_dataset(dataset, workers=1, cache=cache)
    scene(60).save(root / "train" / "a" / "new.jpg")
    progress: list[tuple[int, int]] = []
    again = load_dataset(root, cache=cache)
    inspect_dataset(again, workers=1, cache=cache, progress=lambda *x: progress.append(x))
    assert progress == [(1, 1)]
    monkeypatch.setattr(inspection, "ProcessPoolExecutor", None)  # not needed any more
    assert inspect_dataset(dataset, workers=1, cache=cache) == first


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"x": 3}', '{"x": [1, 2, 3, 4, 5, 6, 7, 8, 9]}']
)
def test_damaged_memory_counts_as_none(tmp_path, content):
    (tmp_path / "facts.json").write_text(content)
    assert inspection.read_facts(tmp_path / "facts.json") == {}
    assert inspection.read_facts(tmp_path / "nothing.json") == {}


def test_a_killed_worker_is_one_clear_error(root, cache, monkeypatch):
    dataset = load_dataset(root, cache=cache)
    # Each worker is told to send itself SIGKILL, as the kernel does when memory runs out.
    monkeypatch.setattr(inspection, "_decode_batch", signal.raise_signal)
    monkeypatch.setattr(inspection, "_paths", lambda batches: [signal.SIGKILL for _ in batches])
    with pytest.raises(VisiontunerError, match="was killed") as caught:
        inspect_dataset(dataset, workers=1, cache=cache)
    assert "\n" not in str(caught.value)


def test_what_was_decoded_before_an_interruption_is_remembered(root, cache):
    dataset = load_dataset(root, cache=cache)

    def interrupt(done: int, total: int) -> None:
        assert total == 8
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_dataset(dataset, workers=1, cache=cache, progress=interrupt)
    progress: list[tuple[int, int]] = []
    inspect_dataset(dataset, workers=1, cache=cache, progress=lambda *x: progress.append(x))
    assert progress[-1] == (5, 5)


def test_summary_counts_and_measures(root, cache):
    scene(70, side=40).resize((200, 40)).save(root / "train" / "b" / "wide.png")
    (root / "train" / "b" / "broken.png").write_bytes(b"nothing")
    dataset = load_dataset(root, cache=cache)
    summary = summarise(dataset)
    assert summary.counts == {"train": [2, 4], "validation": [1, 1], "test": [1, 1]}
    assert summary.totals == {"train": 6, "validation": 2, "test": 2}
    assert summary.width == SizeRange(smallest=96, median=96.0, largest=200)
    assert summary.height == SizeRange(smallest=40, median=96.0, largest=96)
    assert summary.imbalance == 2.0
    inspect_dataset(dataset, workers=1, cache=cache)
    assert summarise(dataset, cache=cache) == summary


def test_summary_of_unreadable_images_has_no_sizes(tmp_path, cache):
    for name in ("train/a", "train/b", "valid/a", "valid/b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "0.png").write_bytes(name.encode())
    summary = summarise(load_dataset(tmp_path / "p", cache=cache))
    assert (summary.width, summary.height) == (None, None)


BYTES = st.binary(min_size=8, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(BYTES, max_size=20),
    st.lists(st.tuples(st.integers(0, 19), st.sets(st.integers(0, 63), max_size=6)), max_size=20),
)
def test_near_pairs_equal_comparing_all_with_all(start, flips):
    values = [int.from_bytes(value, "big") for value in start]
    values += [values[i % len(start)] ^ sum(1 << bit for bit in bits) for i, bits in flips if start]
    expected = [
        [i, j]
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= 4
    ]
    assert near_pairs([f"{value:016x}" for value in values], 4).tolist() == expected


CHILD = """
    import sys, time
    from pathlib import Path
    from visiontuner.data.dataset import load_dataset
    from visiontuner.data.findings import inspect_images

    def told(done, total):
        print("decoding", flush=True)
        time.sleep(3600)

    if __name__ == "__main__":
        root, cache = Path(sys.argv[1]), Path(sys.argv[2])
        inspect_images(load_dataset(root, cache=cache), workers=2, cache=cache, progress=told)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    for number in range(80):
        path = tmp_path / f"data/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    command = [sys.executable, str(script), str(tmp_path / "data"), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert workers
    assert not alive
