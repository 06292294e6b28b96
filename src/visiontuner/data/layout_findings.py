"""What the folders of a data set alone say about it -> findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from visiontuner.data.layout import Layout, left_out_formats, why_not_read
from visiontuner.data.listing import listed
from visiontuner.journal import Finding

_NAMED = 3


def layout_findings(layout: Layout, unreadable: Sequence[str]) -> list[Finding]:
    """Everything that is worth a word; `unreadable` are files that could not be opened."""
    findings: list[Finding | None] = [
        listed(
            "ignored_files",
            "info",
            layout.ignored,
            "left out: no image in a class folder",
            "Nothing to do, unless they should be images.",
        ),
        *_left_out_images(layout),
        listed(
            "classes_left_out",
            "error",
            _left_out_classes(layout),
            "all images of these classes were left out, so that the classes are missing",
            "Bring their images into a format that is read.",
        ),
        listed(
            "folders_beside_splits",
            "warning",
            [f"{folder}: {number} images" for folder, number in layout.beside_splits.items()],
            "left out: not the folder of a split, and it holds images",
            "Name the splits' folders train, valid and test.",
        ),
        listed(
            "broken_links",
            "warning",
            layout.broken_links,
            "left out: the link's target is gone",
            "Restore the targets or remove the links.",
        ),
        listed(
            "unreadable_files",
            "warning",
            unreadable,
            "left out: the file cannot be opened",
            "Check the files' permissions.",
        ),
        listed(
            "empty_class_folders",
            "warning",
            layout.empty_classes,
            "no pictures in the folder",
            "Add pictures or remove the folders.",
        ),
    ]
    findings.append(_same_subfolders(layout) or _merged_subfolders(layout))
    findings += _splits_without_classes(layout)
    return [finding for finding in findings if finding is not None]


def _left_out_images(layout: Layout) -> Iterator[Finding | None]:
    """Images that are in no split, by reason, with their formats."""
    for rule, reason, why, advice in (
        (
            "formats_not_read",
            "format",
            why_not_read(layout.left_out),
            "Save them as JPEG or PNG, or install what reads them.",
        ),
        (
            "images_outside_classes",
            "place",
            "in no class folder",
            "Put each into the folder of its class, train/CLASS/… for example.",
        ),
        (
            "images_without_ending",
            "ending",
            "called like no image",
            "Rename them, to end in .jpg or .png for example.",
        ),
    ):
        files = [file for file in layout.left_out if file.reason == reason]
        yield listed(
            rule,
            "warning",
            [file.path for file in files],
            f"images left out: {left_out_formats(files)}, {why}",
            advice,
        )


def _left_out_classes(layout: Layout) -> list[str]:
    """Class folders all of whose images were left out, where no other split has the class."""
    learned = {file.class_name for file in layout.files}
    return [folder for folder in layout.left_out_classes if Path(folder).name not in learned]


def _splits_without_classes(layout: Layout) -> list[Finding]:
    """What becomes of validation and test where their folders give no images."""
    given = {file.split for file in layout.files}
    folders = {split: folder for folder, split in layout.split_folders.items()}
    found = []
    for split, instead in (
        ("validation", "10 % of train are used for validation"),
        ("test", "there is nothing to test on"),
    ):
        if "train" not in given or split in given:
            continue
        if split in folders:
            found.append(
                Finding(
                    rule="split_without_classes",
                    severity="warning",
                    evidence=f"{folders[split]} holds no images in class folders: {instead}",
                    advice=f"Sort its images into {folders[split]}/CLASS/….",
                )
            )
        elif split == "validation":
            found.append(
                Finding(
                    rule="no_validation_folder",
                    severity="info",
                    evidence=f"there is no validation folder: {instead}",
                    advice="Nothing to do; add a valid folder to choose the pictures yourself.",
                )
            )
    return found


def _same_subfolders(layout: Layout) -> Finding | None:
    """Every class folder holds the same folders: then those are the classes, most often."""
    names, *others = layout.class_folders.values()
    if len(names) < 2 or any(other != names for other in others):
        return None
    return Finding(
        rule="same_subfolders_in_every_class",
        severity="warning",
        evidence=(
            f"every class folder ({_some(list(layout.class_folders))}) holds the same folders "
            f"({_some(names)}), whose pictures are taken together"
        ),
        advice=(
            "If those are the classes, name the folders above them train, valid and test, or look "
            "at one of these alone."
        ),
    )


def _merged_subfolders(layout: Layout) -> Finding | None:
    merged = [
        f"{folder}: {_some(names)}"
        for folder, names in layout.class_folders.items()
        if len(names) > 1
    ]
    return listed(
        "merged_subfolders",
        "warning",
        merged,
        "the folders in a class folder are taken together as one class",
        "If they are classes of their own, put them beside the others.",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
