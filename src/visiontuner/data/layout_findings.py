"""What the folders of a data set alone say about it -> findings."""

from __future__ import annotations

from collections.abc import Sequence

from visiontuner.data.layout import Layout
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
            "left out: not a picture file in a class folder",
            "Remove them, or give pictures one of the usual endings.",
        ),
        listed(
            "folders_beside_splits",
            "warning",
            layout.beside_splits,
            "left out: not the folder of a split, and it holds pictures",
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
    given = {file.split for file in layout.files}
    if "train" in given and "validation" not in given:
        findings.append(
            Finding(
                rule="no_validation_folder",
                severity="info",
                evidence="there is no validation folder: 10 % of train are used for validation",
                advice="Nothing to do; add a valid folder to choose the pictures yourself.",
            )
        )
    return [finding for finding in findings if finding is not None]


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
