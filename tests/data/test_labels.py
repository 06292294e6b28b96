"""Tables of labels, groups and class maps: the same data set as class folders, or one line."""

import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visiontuner.data.dataset import SPLITS, load_dataset
from visiontuner.data.labels import read_table
from visiontuner.errors import DataError

HEADER = ["path", "label", "split", "group"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Class folders cat, dog and cow with twenty images each."""
    root = tmp_path / "images"
    rng = np.random.default_rng(5)
    for name in ("cat", "cow", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(20):
            levels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / name / f"{number:02}.png")
    return root


def rows_of(root: Path) -> list[list[str]]:
    paths = sorted(path.relative_to(root) for path in root.glob("*/*.png"))
    return [[path.as_posix(), path.parent.name] for path in paths]


def write_csv(path: Path, rows: list[list[str]], header: list[str] = HEADER, **form: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **form).writerows([header[: len(rows[0])], *rows])
    return path


def write_for_excel(path: Path, rows: list[list[str]]) -> Path:
    write_csv(path, rows, delimiter=";")
    path.write_bytes(b"\xef\xbb\xbfsep=;\r\n" + path.read_bytes())
    return path


def write_json_lines(path: Path, rows: list[list[object]], header: list[str] = HEADER) -> Path:
    lines = [json.dumps(dict(zip(header, row, strict=False))) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[list[object]], header: list[str] = HEADER) -> Path:
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=False))
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def rules(dataset) -> dict[str, str]:
    return {finding.rule: finding.evidence for finding in dataset.findings}


# A table is the same data set as the folders


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("labels.csv", write_csv),
        ("labels.CSV", lambda path, rows: write_csv(path, rows, delimiter=";")),
        ("labels.csv", lambda path, rows: write_csv(path, rows, ["Path", "LABEL"])),
        ("labels.csv", lambda path, rows: write_csv(path, rows, lineterminator="\r")),
        ("labels.csv", lambda path, rows: write_csv(path, rows, quoting=csv.QUOTE_ALL)),
        ("labels.csv", lambda path, rows: write_for_excel(path, rows)),
        ("labels.tsv", lambda path, rows: write_csv(path, rows, delimiter="\t")),
        ("labels.jsonl", write_json_lines),
        ("labels.parquet", write_parquet),
    ],
)
def test_a_table_is_the_same_data_set_as_the_class_folders(root, cache, name, write):
    folders = load_dataset(root, cache=cache)
    table = load_dataset(write(root / name, rows_of(root)[::-1]), cache=cache)
    assert table.digest == folders.digest
    assert (table.root, table.class_names, table.splits) == (
        folders.root,
        folders.class_names,
        folders.splits,
    )
    assert table.findings == ()
    assert table.described == f"{name}: 60 images, 3 classes"


def test_a_table_with_splits_is_the_same_data_set_as_split_folders(root, cache):
    for name in ("cat", "cow", "dog"):
        for split, numbers in {
            "train": range(14),
            "val": range(14, 17),
            "test": range(17, 20),
        }.items():
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                (root / name / f"{number:02}.png").rename(root / split / name / f"{number}.png")
        (root / name).rmdir()
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    rows = [[path, path.split("/")[1], path.split("/")[0]] for path in paths]
    table = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    assert table.counts("test") == [3, 3, 3]
    assert table.digest == load_dataset(root, cache=cache).digest
    assert table.described == "labels.csv: 60 images, 3 classes, splits in column `split`"


def test_an_empty_cell_of_a_split_column_is_train(root, cache):
    rows = [[*row, "test" if row[0].endswith("7.png") else ""] for row in rows_of(root)]
    dataset = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    assert dataset.counts("test") == [2, 2, 2]
    assert dataset.counts("validation") == [2, 2, 2]  # a tenth of the eighteen others
    assert "no images are given for validation" in rules(dataset)["no_validation_folder"]


def test_a_byte_order_mark_backslashes_and_detours_are_read(root, cache):
    before = load_dataset(root, cache=cache)
    rows = [[f".\\{path}".replace("/", "\\"), f" {label} "] for path, label in rows_of(root)]
    path = write_csv(root / "labels.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_dataset(path, cache=cache).digest == before.digest


def test_columns_of_other_names_and_whole_numbers_as_labels(root, cache):
    numbers = {"cat": 0, "cow": 1, "dog": 2}
    rows = [[path[:-4], numbers[label], 0.5] for path, label in rows_of(root)]
    table = write_json_lines(root / "labels.jsonl", rows, ["which", "breed", "score"])
    dataset = load_dataset(table, columns={"path": "which", "label": "breed"}, cache=cache)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.splits["train"][0].path.endswith(".png")  # the rows say no ending


def test_labels_that_look_like_numbers_stay_as_they_are_written(root, cache):
    rows = [[path, f" {('cat', 'cow', 'dog').index(label):03} "] for path, label in rows_of(root)]
    dataset = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    assert dataset.class_names == ("000", "001", "002")


def test_labels_that_look_alike_are_named(root, cache):
    twins = {"cat": "dog\u200b", "cow": "dog", "dog": "Dog "}
    rows = [[path, twins[label]] for path, label in rows_of(root)]
    dataset = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    assert rules(dataset)["class_names_alike"].startswith("1 (Dog and dog and 'dog\\u200b'): names")


def test_accented_labels_are_one_class_however_they_are_encoded(root, cache):
    rows = rows_of(root)
    for index, row in enumerate(rows):
        row[1] = ("caf\u00e9", "cafe\u0301", "b")[index % 3]
    dataset = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    assert dataset.class_names == ("b", "caf\u00e9")


def test_paths_are_found_however_their_accents_are_encoded(root, cache):
    """macOS stores é as two characters; tables that other programs write have it as one."""
    (root / "cat").rename(root / "cafe\u0301")
    (root / "dog").rename(root / "\u00e9t\u00e9")
    (root / "\u00e9t\u00e9" / "03.png").rename(root / "\u00e9t\u00e9" / "u\u0308 3.png")
    before = load_dataset(root, cache=cache)
    for form in ("NFC", "NFD"):
        rows = [[unicodedata.normalize(form, path), label] for path, label in rows_of(root)]
        dataset = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
        assert dataset.digest == before.digest
        fix = write_csv(root / "fix.csv", [[path, "cow"] for path, _ in rows[:20]])
        fixed = load_dataset(root, labels=fix, cache=cache)
        assert "labels_without_image" not in rules(fixed)
        assert "changes 20 labels" in fixed.described
    rows = [[unicodedata.normalize("NFC", path)[:-4], label] for path, label in rows_of(root)]
    without_endings = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    assert without_endings.digest == before.digest


# What is wrong with a table


def _text(text: str, encoding: str = "utf-8"):
    return lambda path: path.write_bytes(text.encode(encoding))


def _wide(path: Path) -> None:
    path.write_text("path,label\n" + "".join(f"cat/1.png,{n}\n" for n in range(1_000_000)))


def _parquet(columns: dict[str, list[object]]):
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


GOOD = "cat/01.png,cat\ndog/01.png,dog\n"
REFUSED = [
    ("l.csv", _text(""), "is empty: a table begins with the names of its columns"),
    ("l.csv", _text("path,label\n"), "has a header and no rows"),
    ("l.csv", _text(f"path,label\ncat/02.png,café\n{GOOD}", "latin-1"), "not UTF-8 .byte 0xe9"),
    ("l.csv", _text(f"path,label\n{GOOD}", "utf-16"), "not UTF-8 .UTF-16.: save it again"),
    ("l.csv", _text(f"path,label\n{GOOD}", "utf-16-le"), "not UTF-8 .it holds NUL"),
    ("l.csv", lambda path: path.write_bytes(b"PK\3\4\0\0"), "a zip file, or an Excel workbook"),
    ("l.csv", _text(GOOD), r"begins with a row .'cat/01.png', 'cat'.: .* `path,label`"),
    ("l.csv", _text("<html>" * 90), r"no column 'path', only '<html>.{34}…'; name it"),
    ("l.csv", _text(f"path,label\n{GOOD.replace(',', ';')}"), "line 2: 1 fields, and the first"),
    ("l.csv", _text("path,label\ncat/01.png,c\u202e\ndog/01.png,dog\n"), "1 rows are left out"),
    ("l.csv", _text(f"path,label\n{'x' * 200_000},cat\n"), "line 2: field larger than field"),
    ("l.jsonl", _text('{"path": "cat/01.png", "label": 1}', "utf-16"), "not UTF-8 .UTF-16"),
    ("l.csv", _text(f"path,label,label\n{GOOD}"), "has 2 columns called 'label'"),
    ("l.csv", _text(f"where,label\n{GOOD}"), "no column 'path', only 'where', 'label'; name it"),
    ("l.csv", _text(f"path,breed\n{GOOD}"), "no column 'label', only .* with data.columns.label"),
    ("l.csv", _text(f"path,label\n{GOOD}dog/02.png,dog,big\n"), "line 4: 3 fields, and the first"),
    ("l.csv", _text(f"path,label\n{GOOD}dog/02.png\n"), "line 4: 1 fields, and the first"),
    ("l.csv", _text(f'path,label\n{GOOD}"dog/02.png,dog\n'), r"line 4: .*\(quotes\?\)"),
    ("l.csv", _text("path label\ncat/01.png cat\n"), "no column 'path', only 'path label'"),
    ("l.csv", _text("path,label\ncat/01.png,cat\ncat/02.png,cat\n"), "has only one class, cat"),
    ("l.csv", _wide, "has 1,000,000 different values in 1,000,000 rows, too many to be classes"),
    ("l.jsonl", _text(""), "is empty: a line of it is an object"),
    ("l.jsonl", _text('{"path": "cat/01.png", "label": "cat"}\n{"path": '), "line 2 is no JSON"),
    ("l.jsonl", _text('["cat/01.png", "cat"]'), "line 1 is no object such as"),
    ("l.jsonl", _text('{"path": "cat/01.png", "label": ["cat"]}'), "line 1: the label is a list"),
    ("l.parquet", _text(f"path,label\n{GOOD}"), "is no Parquet file"),
    ("l.parquet", _text(""), "is no Parquet file"),
    ("l.parquet", _parquet({"path": ["a.png"], "label": [b"x"]}), "line 1: the label is a bytes"),
    ("l.parquet", _parquet({"path": ["a.png"]}), "no column 'label', only 'path'"),
]  # fmt: skip


def test_the_kinds_of_broken_tables_are_25_at_least():
    assert len(REFUSED) + len(BAD_ROWS) >= 25


@pytest.mark.parametrize(("name", "write", "message"), REFUSED)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(root, cache, name, write, message):
    write(root / name)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(root / name, cache=cache)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


BAD_ROWS = [
    ("", "cat", "", "rows_without_path", "line 62: "),
    ("/etc/cat.png", "cat", "", "rows_outside_the_folder", "line 62: /etc/cat.png"),
    ("C:\\cat.png", "cat", "", "rows_outside_the_folder", "line 62: C:/cat.png"),
    ("cat/../../x.png", "cat", "", "rows_outside_the_folder", "line 62: cat/../../x.png"),
    ("https://a.org/1.png", "cat", "", "rows_outside_the_folder", "line 62: https://a.org/1.png"),
    ("cat/99.png", "cat", "", "rows_without_file", "line 62: cat/99.png"),
    ("cat", "cat", "", "rows_without_file", "line 62: cat"),
    ("cat/\0.png", "cat", "", "rows_without_file", "line 62: cat/\0.png"),
    ("labels.csv", "cat", "", "rows_without_image", "line 62: labels.csv"),
    ("cat/new.png", "", "", "rows_without_label", "line 62: cat/new.png"),
    ("cat/new.png", "NaN", "", "rows_without_label", "line 62: cat/new.png"),
    ("cat/new.png", "c\x1bat", "", "rows_without_label", "line 62: cat/new.png"),
    ("cat/new.png", "cat", "holdout", "rows_with_unknown_split", "line 62: cat/new.png: 'holdout'"),
    ("cat/01.png", "dog", "", "images_in_two_rows", "cat/01.png (lines 3 and 62)"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "label", "split", "rule", "item"), BAD_ROWS)
def test_a_row_without_a_usable_image_is_listed_or_refused(
    root, cache, path, label, split, rule, item
):
    rows = [[*row, ""] for row in rows_of(root)]
    Image.new("RGB", (4, 4), "red").save(root / "cat" / "new.png")
    table = write_csv(root / "labels.csv", [*rows, [path, label, split]])
    dataset = load_dataset(table, cache=cache)
    (finding,) = [f for f in dataset.findings if f.rule == rule]
    assert (finding.severity, finding.items) == ("warning", (item,))
    images = sum(map(len, dataset.splits.values()))
    assert images == (59 if rule == "images_in_two_rows" else 60)
    with pytest.raises(DataError, match=r"leave them out with data\.on_bad_image: skip") as caught:
        load_dataset(table, on_bad_image="fail", cache=cache)
    assert str(caught.value).startswith(f"labels.csv: {item}: ")
    assert "\n" not in str(caught.value)


def test_a_table_without_one_usable_row_is_refused(root, cache):
    table = write_csv(root / "labels.csv", [["x/1.png", "cat"], ["x/2.png", "dog"]])
    with pytest.raises(DataError, match=r"2 rows, line 2: x/1.png: there is no such file"):
        load_dataset(table, cache=cache)


def test_a_row_that_is_there_twice_counts_once(root, cache):
    rows = rows_of(root)
    dataset = load_dataset(write_csv(root / "labels.csv", [*rows, rows[0]]), cache=cache)
    assert rules(dataset) == {
        "repeated_rows": "1 (cat/00.png (lines 2 and 62)): rows that say the same of one image; "
        "it counts once"
    }


def test_a_column_that_is_not_there_is_named(root, cache):
    table = write_csv(root / "labels.csv", rows_of(root))
    with pytest.raises(DataError, match=r"no column 'dog' \(data.columns.group\): 'path', 'label'"):
        load_dataset(table, columns={"group": "dog"}, cache=cache)


# Labels of single images, and classes


def test_labels_override_and_drop_single_images(root, cache):
    table = write_csv(root / "fix.csv", [["cat/00.png", "dog"], ["dog/00.png", ""]])
    dataset = load_dataset(root, labels=table, cache=cache)
    labels = {s.path: s.label for samples in dataset.splits.values() for s in samples}
    assert labels["cat/00.png"] == dataset.class_names.index("dog")
    assert "dog/00.png" not in labels
    assert len(labels) == 59
    assert dataset.findings == ()
    assert dataset.described == (
        "images: 59 images, 3 classes, fix.csv changes 1 labels and drops 1 images"
    )


def test_labels_that_name_no_image_are_listed_or_refused(root, cache):
    table = write_csv(root / "fix.csv", [["cat/77.png", "dog"]])
    dataset = load_dataset(root, labels=table, cache=cache)
    assert "1 (line 2: cat/77.png)" in rules(dataset)["labels_without_image"]
    with pytest.raises(DataError, match=r"data\.labels names an image that is not there"):
        load_dataset(root, labels=table, on_bad_image="fail", cache=cache)
    write_csv(table, [["cat/00.png", "dog"], ["cat/00.png", "cow"]])
    with pytest.raises(DataError, match=r"line 3: cat/00.png a second time"):
        load_dataset(root, labels=table, cache=cache)


def test_a_class_map_merges_renames_and_leaves_out(root, cache):
    names = write_csv(
        root / "map.csv", [["cat", "pet"], ["dog", "pet"], ["gnu", "x"]], ["class", "becomes"]
    )
    dataset = load_dataset(root, classes=names, cache=cache)
    assert dataset.class_names == ("cow", "pet")
    assert [sum(dataset.counts(split)[1] for split in SPLITS)] == [40]
    assert "1 (gnu)" in rules(dataset)["unknown_classes"]
    assert dataset.described == "images: 60 images, 2 classes, classes after map.csv"
    write_csv(names, [["cow", ""]], ["class", "becomes"])
    without = load_dataset(root, classes=names, cache=cache)
    assert without.class_names == ("cat", "dog")
    assert len({dataset.digest, without.digest, load_dataset(root, cache=cache).digest}) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["cat", "pet"], ["cat", "dog"]], "line 3: the class cat a second time"),
        ([["", "pet"]], "line 2: no class"),
        ([["cat", "dog"], ["cow", "dog"]], "has only one class, dog"),
    ],
)
def test_a_class_map_that_cannot_be_is_refused(root, cache, rows, message):
    names = write_csv(root / "map.csv", rows, ["class", "becomes"])
    with pytest.raises(DataError, match=message):
        load_dataset(root, classes=names, cache=cache)


# Groups


def group_places(dataset) -> dict[str | None, set[str]]:
    places: dict[str | None, set[str]] = {}
    for split, samples in dataset.splits.items():
        for sample in samples:
            places.setdefault(sample.group, set()).add(split)
    return places


def test_a_group_column_keeps_groups_in_one_split_and_says_so(root, cache):
    rows = [[*row, "", f"{row[1]} {index % 10}"] for index, row in enumerate(rows_of(root))]
    dataset = load_dataset(write_csv(root / "labels.csv", rows), cache=cache)
    places = group_places(dataset)
    assert len(places) == 30
    assert all(len(splits) == 1 for splits in places.values())
    # Ten groups of two in each class: one for validation and one for the test.
    assert {split: dataset.counts(split) for split in SPLITS} == {
        "train": [16, 16, 16],
        "validation": [2, 2, 2],
        "test": [2, 2, 2],
    }
    assert rules(dataset)["groups"].startswith(
        "60 of 60 images share a group with others: 30 groups, the largest cat 1 with 2; 0 images"
    )
    assert dataset.described.endswith("splits in column `split`, groups in column `group`")


def test_a_pattern_of_names_is_the_same_as_a_column(root, cache):
    for path in root.glob("*/*.png"):
        path.rename(path.with_name(f"{path.parent.name}{int(path.stem) % 10}_{path.stem}.png"))
    pattern = load_dataset(root, group=r"(.*)_\d+", cache=cache)
    rows = [[*row, Path(row[0]).stem.split("_")[0]] for row in rows_of(root)]
    table = write_csv(root / "labels.csv", rows, ["path", "label", "group"])
    column = load_dataset(table, cache=cache)
    assert column.splits == pattern.splits
    assert pattern.digest == column.digest != load_dataset(root, cache=cache).digest
    of_path = load_dataset(root, group="(cat|dog)/", cache=cache)
    assert {group for group in group_places(of_path) if group} == {"cat", "dog"}
    with pytest.raises(DataError, match=r"leave out data\.group, or that column"):
        load_dataset(table, group=r"(.*)_\d+", cache=cache)


def test_copies_in_two_groups_keep_both_in_one_split(root, cache):
    rows = [[*row, f"{row[1]} {index % 10}"] for index, row in enumerate(rows_of(root))]
    (root / "cat" / "01.png").write_bytes((root / "cat" / "00.png").read_bytes())
    table = write_csv(root / "labels.csv", rows, ["path", "label", "group"])
    places = group_places(load_dataset(table, cache=cache))
    assert places["cat 0"] == places["cat 1"]


def test_a_group_in_two_given_splits_is_refused(root, cache):
    rows = [
        [*row, ("train", "test")[i % 2], f"{row[1]} {i % 5}"] for i, row in enumerate(rows_of(root))
    ]
    with pytest.raises(DataError, match=r"group cat \d is in train .* and test .*14 more groups"):
        load_dataset(write_csv(root / "labels.csv", rows), cache=cache)


def test_groups_too_few_for_a_validation_split_are_said(root, cache):
    with pytest.raises(DataError, match=r"none of them is for validation. Each of the 3 groups is"):
        load_dataset(root, group=r"(.*)/\d+", cache=cache)


def test_one_large_group_in_validation_is_a_warning(root, cache):
    rows = rows_of(root)
    names = [f"g{number}" for number in range(400)]

    def loaded(large: str):
        table = [
            [*row, large if index % 20 < 9 and row[1] == "cat" else f"{row[0]}"]
            for index, row in enumerate(rows)
        ]
        return load_dataset(
            write_csv(root / "labels.csv", table, ["path", "label", "group"]), cache=cache
        )

    found = next(d for name in names if group_places(d := loaded(name))[name] == {"validation"})
    assert "validation holds 22% of the images" in rules(found)["groups_of_unequal_size"]


SIZES = st.lists(st.integers(1, 6), min_size=5, max_size=20)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sizes=st.tuples(SIZES, SIZES), more=st.lists(st.integers(0, 99), min_size=1, max_size=9))
def test_no_group_is_in_two_splits_and_more_images_of_groups_move_nothing(
    cache, image_pool, sizes, more
):
    """Groups of one to six images in two classes; then some of them get more images."""
    pool = iter(image_pool)
    groups = [
        (f"{label}{number}", label, size)
        for label, of_class in zip("ab", sizes, strict=True)
        for number, size in enumerate(of_class)
    ]
    rows = [[next(pool).name, label, name] for name, label, size in groups for _ in range(size)]
    table, header = image_pool[0].parent / "labels.csv", ["path", "label", "group"]
    before = group_places(load_dataset(write_csv(table, rows, header), cache=cache))
    assert all(len(splits) == 1 for splits in before.values())
    for split in ("validation", "test"):
        for label, of_class in zip("ab", sizes, strict=True):
            held = sum(places == {split} for name, places in before.items() if name[0] == label)
            assert abs(held - len(of_class) / 10) <= 0.5
    chosen = [groups[number % len(groups)] for number in more]
    rows += [[next(pool).name, label, name] for name, label, _ in chosen]
    after = group_places(load_dataset(write_csv(table, rows, header), cache=cache))
    assert after == before


@pytest.fixture(scope="module")
def image_pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(9)
    paths = [folder / f"{number:03}.png" for number in range(260)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return paths


def test_every_cell_of_a_table_is_text(tmp_path):
    table = write_parquet(
        tmp_path / "l.parquet",
        [["a.png", 3.0, "train", 7], ["b.png", None, None, 8]],
    )
    rows = [(row.label, row.split, row.group) for row in read_table(table).rows]
    assert rows == [("3", "train", "7"), ("", "", "8")]


# Layouts with tables that nobody has to name


def flat(root: Path, folder: str) -> list[list[str]]:
    """The images of class folders in one folder, `cat00.png`; their names and labels."""
    (root / folder).mkdir()
    rows = []
    for path, label in rows_of(root):
        name = path.replace("/", "")
        (root / path).rename(root / folder / name)
        rows.append([name, label])
    for name in ("cat", "cow", "dog"):
        (root / name).rmdir()
    return rows


def contents(dataset) -> dict[str, set[tuple[str, str]]]:
    return {
        split: {(s.digest, dataset.class_names[s.label]) for s in samples}
        for split, samples in dataset.splits.items()
    }


@pytest.mark.parametrize(
    ("folder", "table", "header", "ending"),
    [
        ("train", "train.csv", ["id", "label"], ""),  # a competition's
        ("train", "train.csv", ["filename", "class"], ".png"),
        ("images", "labels.csv", ["path", "label"], ".png"),
        ("images", "metadata.csv", ["file_name", "label"], ".png"),
    ],
)
def test_a_flat_folder_with_a_table_is_found(root, cache, folder, table, header, ending):
    before = contents(load_dataset(root, cache=cache))
    rows = [[name[:-4] + ending, label] for name, label in flat(root, folder)]
    write_csv(root / table, rows, header)
    (root / "test").mkdir()
    (root / "test" / "1.png").write_bytes((root / folder / "cat00.png").read_bytes())
    write_csv(root / "test.csv", [["1"]], ["id"])
    if folder != "train":  # a folder called test means a split, and then there has to be train
        (root / "test" / "1.png").unlink()
        (root / "test").rmdir()
        (root / "test.csv").unlink()
    dataset = load_dataset(root, cache=cache)
    assert contents(dataset) == before
    left_out = ", test.csv left out, without labels" if folder == "train" else ""
    assert dataset.described == f"{table}: 60 images, 3 classes{left_out}"


def test_a_table_for_each_split_beside_its_folder(root, cache):
    rows = flat(root, "train")
    (root / "val").mkdir()
    for name, _ in rows[::5]:
        (root / "train" / name).rename(root / "val" / name)
    write_csv(root / "train.csv", [row for i, row in enumerate(rows) if i % 5])
    write_csv(root / "val.csv", rows[::5])
    dataset = load_dataset(root, cache=cache)
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 48,
        "validation": 12,
        "test": 0,
    }
    assert dataset.described == "train.csv, val.csv: 60 images, 3 classes"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_hugging_faces_metadata_in_each_split_or_above_them(root, cache, name):
    write = write_csv if name.endswith("csv") else write_json_lines
    rows, header = flat(root, "train"), ["file_name", "label"]
    (root / "test").mkdir()
    for path, _ in rows[::4]:
        (root / "train" / path).rename(root / "test" / path)
    parts = {"train": [row for i, row in enumerate(rows) if i % 4], "test": rows[::4]}
    for split, part in parts.items():
        write(root / split / name, part, header)
    each = load_dataset(root, cache=cache)
    assert each.counts("test") == [5, 5, 5]
    assert each.described == f"test/{name}, train/{name}: 60 images, 3 classes"
    for split in parts:
        (root / split / name).unlink()
    above = [[f"{split}/{path}", label] for split, part in parts.items() for path, label in part]
    write(root / name, above, header)
    once = load_dataset(root, cache=cache)
    assert once.digest == each.digest
    assert once.described == f"{name}: 60 images, 3 classes, splits by their folders"


def test_ultralytics_folders_and_a_wrapped_table_are_read(root, cache, tmp_path):
    before = contents(load_dataset(root, cache=cache))
    rows = flat(root, "images")
    write_csv(root / "labels.csv", rows)
    (tmp_path / "unpacked").mkdir()
    root.rename(tmp_path / "unpacked" / "photos")
    assert contents(load_dataset(tmp_path / "unpacked", cache=cache)) == before
    classify = tmp_path / "classify"
    for index, (name, label) in enumerate(rows):
        folder = classify / ("train", "train", "val", "test")[index % 4] / label
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / "photos" / "images" / name).rename(folder / name)
    dataset = load_dataset(classify, cache=cache)
    assert dataset.counts("validation") == dataset.counts("test") == [5, 5, 5]


def test_a_table_beside_class_folders_is_not_read_and_said(root, cache):
    before = load_dataset(root, cache=cache)
    write_csv(root / "labels.csv", rows_of(root)[:30])
    dataset = load_dataset(root, cache=cache)
    assert dataset.digest == before.digest
    assert rules(dataset)["tables_not_read"].startswith("1 (labels.csv): a table lies beside")


def test_a_broken_table_of_a_layout_is_said_and_not_the_missing_class_folders(root, cache):
    rows = flat(root, "train")
    write_csv(root / "train.csv", rows, ["id", "breed"])
    with pytest.raises(DataError, match=r"no column 'label', only .*data\.columns\.label"):
        load_dataset(root, cache=cache)
    dataset = load_dataset(root, columns={"label": "breed"}, cache=cache)
    assert dataset.class_names == ("cat", "cow", "dog")
