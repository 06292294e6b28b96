"""What is wrong with a data set's images, before a training tells it in worse ways.

Every image is decoded once, by `inspect_images`; the rules are functions of what that showed.
What is odd (blurred, dark, blank, odd-shaped) is odd beside the other images too: a data set that
is dark or soft throughout (X-rays, night photographs) has hardly any odd ones.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from visiontuner.data.arrays import available_cpus, initialise_worker
from visiontuner.data.dataset import (
    SPLITS,
    ImageDataset,
    Sample,
    few_levels,
    find_emptied_classes,
    listed,
)
from visiontuner.data.images import (
    DECODING_VERSION,
    decode_image,
    has_few_levels,
    image_extensions,
    open_image,
)
from visiontuner.errors import BadImageError, VisiontunerError
from visiontuner.io.files import write_cached_json
from visiontuner.journal import Finding

# The shorter side at which sharpness is measured, pixels; smaller images as they are. What is
# sharp there is sharp enough for networks, whose input is 224.
SHARPNESS_SIDE = 128
_TILE = 16
_LEAST_CONTRAST = 6.0  # standard deviation of a tile's gray levels; of less no sharpness is seen
# Both were measured on photographs of dogs and flowers: no sharp one is below both, 77 % are once
# they are blurred by 1.5 of 224 pixels, all once it is 3 pixels (docs/insight.md).
_SHARP_TEXTURE, _SHARP_EDGE = 0.9, 0.3
SHARPEST = 9.0  # no more is told apart; also of images without any contrast
DARK = 90  # of 255; what is darker has hardly a light pixel
LONG = 3.0  # times as long as wide, or as wide as long


def sharpness(image: Image.Image) -> float:
    """How sharp the sharpest parts of an image are; below 1 no part is.

    Texture: the standard deviation of the Laplacian by that of the gray levels, in the sharpest 2 %
    of the tiles of 16 x 16 pixels. Edges: the highest 0.5 % of the Laplacian by the range of the
    gray levels. Each by what it has in sharp photographs; the larger one counts, so that a blurred
    background is no matter.

    Args:
        image: mode RGB, any size.

    Returns:
        A ratio in [0, 9].

    Source: variance of the Laplacian, Pech-Pacheco et al. 2000,
    https://doi.org/10.1109/ICPR.2000.903548
    """
    gray = _gray(image)
    if min(gray.shape) < _TILE + 2:
        return SHARPEST
    inner = gray[1:-1, 1:-1]
    laplacian = 4 * inner - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]
    contrast = _tiles(inner).std(axis=1)
    visible = contrast > _LEAST_CONTRAST
    if not visible.any():
        return SHARPEST
    texture = np.percentile(_tiles(laplacian).std(axis=1)[visible] / contrast[visible], 98)
    low, high = np.percentile(gray, (1, 99))
    edge = np.percentile(np.abs(laplacian), 99.5) / max(float(high - low), 1.0)
    return min(SHARPEST, round(float(max(texture / _SHARP_TEXTURE, edge / _SHARP_EDGE)), 3))


def _gray(image: Image.Image) -> NDArray[np.float32]:
    shorter = min(image.size)
    if shorter > SHARPNESS_SIDE:
        width, height = (max(1, round(n * SHARPNESS_SIDE / shorter)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("L"), dtype=np.float32)


def _tiles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whole tiles of an array of shape (H, W): float32, shape (T, 256)."""
    rows, columns = values.shape[0] // _TILE, values.shape[1] // _TILE
    whole = values[: rows * _TILE, : columns * _TILE]
    split = whole.reshape(rows, _TILE, columns, _TILE).swapaxes(1, 2)
    return split.reshape(-1, _TILE * _TILE)


def brightness(image: Image.Image) -> int:
    """The level in [0, 255] that 5 % of an image's pixels (RGB) reach with any colour."""
    red, green, blue = image.split()
    counts = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    return int(np.searchsorted(np.cumsum(counts), 0.95 * image.width * image.height))


def are_blurred(sharpnesses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Images without a sharp part, less than half as sharp as the middle one, shape (N,)."""
    return _below(sharpnesses, 1.0)


def are_dark(brightnesses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Images with hardly a light pixel, less than half as bright as the middle one, shape (N,)."""
    return _below(brightnesses, DARK)


def _below(values: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
    if not len(values):
        return np.zeros(0, dtype=bool)
    below: NDArray[np.bool_] = values < min(limit, float(np.median(values)) / 2)
    return below


# Pairs of nearly equal bit strings among many, without comparing all with all.


def near_pairs(hashes: Sequence[str], max_distance: int) -> NDArray[np.int64]:
    """All pairs of hashes that differ in at most `max_distance` bits; none is missed.

    Cut into `max_distance` + 1 bands, two such hashes are equal in one band at least, so only
    pairs that share a band are compared. 10,000 random hashes take a fraction of a second.

    Args:
        hashes: hexadecimal, all of one length, a multiple of 16 digits.

    Returns:
        int64, shape (num_pairs, 2): indices i < j, sorted, each pair once.
    """
    if len(hashes) < 2:
        return np.empty((0, 2), dtype=np.int64)
    packed = np.array([list(bytes.fromhex(text)) for text in hashes], dtype=np.uint8)
    words = packed.view(np.uint64)  # (N, bits / 64), for counting differing bits
    bits = np.unpackbits(packed, axis=1)  # (N, bits)
    found = [
        _close_pairs(words, candidates, max_distance)
        for band in np.array_split(bits, max_distance + 1, axis=1)
        for candidates in _equal_pairs(np.packbits(band, axis=1))
    ]
    pairs = np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)
    return np.unique(pairs, axis=0)


def _equal_pairs(rows: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Pairs of equal rows in blocks of shape (n, 2): neighbours in sorted order, next but one, …"""
    _, keys = np.unique(rows, axis=0, return_inverse=True)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    start = np.arange(len(order))
    blocks: list[NDArray[np.int64]] = []
    distance = 1
    while True:
        start = start[start < len(order) - distance]
        start = start[keys[start] == keys[start + distance]]
        if not len(start):
            return blocks
        blocks.append(np.stack([order[start], order[start + distance]], axis=1))
        distance += 1


def _close_pairs(
    words: NDArray[np.uint64], pairs: NDArray[np.int64], max_distance: int
) -> NDArray[np.int64]:
    distance = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).sum(axis=1)
    close: NDArray[np.int64] = np.sort(pairs[distance <= max_distance], axis=1)
    return close


# Decode every image once, in worker processes, and remember what it turned out to be.


# 16 x 16 bits of perceptual hash. Measured: a photograph saved again, smaller or brighter is at
# most 16 bits away, two different photographs at least 90, two handwritten digits at least 26.
HASH_SIDE = 16
_BATCH = 32  # images in one message to a worker
_VERSION = 3


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding one image showed; `error` alone is set where it cannot be decoded."""

    format: str = ""  # Pillow's name
    width: int = 0  # pixels, as stored
    height: int = 0
    perceptual_hash: str = ""  # hexadecimal, HASH_SIDE ** 2 bits
    error: str = ""
    few_levels: bool = False
    sharpness: float = SHARPEST  # see data/findings.py
    brightness: int = 255


def inspect_images(
    dataset: ImageDataset,
    *,
    workers: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ImageFacts]:
    """Facts by content digest; only images that no earlier call has seen are decoded.

    Args:
        workers: processes that decode; one for each core by default.
        progress: called with (images done, images to decode).

    Raises:
        VisiontunerError: a worker died. What was decoded until then is remembered.
    """
    store = facts_file(dataset, cache)
    facts = read_facts(store)
    paths = {s.digest: s.path for samples in dataset.splits.values() for s in samples}
    unknown = [(digest, dataset.root / path) for digest, path in paths.items()]
    unknown = [(digest, path) for digest, path in unknown if digest not in facts]
    if unknown:
        try:
            for done, (digest, found) in enumerate(_decode_all(unknown, workers), 1):
                facts[digest] = found
                if progress is not None:
                    progress(done, len(unknown))
        finally:
            write_cached_json(store, {digest: astuple(found) for digest, found in facts.items()})
    return {digest: facts[digest] for digest in paths}


def facts_file(dataset: ImageDataset, cache: Path) -> Path:
    """Where the facts about a data set's images are remembered."""
    key = hashlib.sha256(os.fsencode(dataset.root.resolve())).hexdigest()[:24]
    return cache / "inspections" / f"{key}-{_VERSION}-{DECODING_VERSION}.json"


def read_facts(store: Path) -> dict[str, ImageFacts]:
    """Remembered facts by content digest; none if there is no such file or it is damaged."""
    try:
        raw = json.loads(store.read_text(encoding="utf-8"))
        return {digest: ImageFacts(*row) for digest, row in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def read_header(path: Path) -> tuple[str, int, int]:
    """Format, width and height from an image's header.

    Raises:
        BadImageError: the header cannot be read.
    """
    with open_image(path) as image:
        return image.format or "", image.width, image.height


def _decode_all(
    images: Sequence[tuple[str, Path]], workers: int | None
) -> Iterator[tuple[str, ImageFacts]]:
    batches = [list(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
    processes = min(workers or available_cpus(), len(batches))
    # fork is unsafe in a process with threads, and torch and Ray start some.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=initialise_worker)
    try:
        for batch, found in zip(batches, pool.map(_decode_batch, _paths(batches)), strict=True):
            yield from zip([digest for digest, _ in batch], found, strict=True)
    except BrokenProcessPool:
        raise VisiontunerError(
            "A worker process that decodes images was killed, perhaps for its memory. "
            "Run the same command again; it goes on where it stopped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _paths(batches: Iterable[list[tuple[str, Path]]]) -> list[list[Path]]:
    return [[path for _, path in batch] for batch in batches]


def _decode_batch(paths: list[Path]) -> list[ImageFacts]:
    return [_decode(path) for path in paths]


def _decode(path: Path) -> ImageFacts:
    import imagehash  # in the workers only

    try:
        # The hash looks at 64 x 64 pixels: a photograph is decoded at an eighth of its size.
        image = decode_image(path, target=4 * HASH_SIDE)
        name, width, height = read_header(path)
    except BadImageError as error:
        return ImageFacts(error=str(error).removeprefix(f"Cannot read {path}: "))
    return ImageFacts(
        format=name,
        width=width,
        height=height,
        perceptual_hash=str(imagehash.phash(image, hash_size=HASH_SIDE)),
        few_levels=has_few_levels(image),
        sharpness=sharpness(image),
        brightness=brightness(image),
    )


Facts = Mapping[str, ImageFacts]

IMBALANCE_RATIO = 10
TINY_PIXELS = 32  # of a network's usual 224: seven times enlarged
NEAR_BITS = 16  # of 256; what distances mean is said in inspection.py
# The same content under another name in Pillow; a person would not call the ending wrong.
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}


@dataclass(frozen=True)
class SizeRange:
    """Smallest, middle and largest of a length in pixels."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """The numbers that describe a data set.

    Args:
        counts: images of each class, in the order of `class_names`, by split name.
        totals: images by split name.
        width, height: over all readable images as they are stored; None if there is none.
        imbalance: images of train's largest class for one of its smallest (empty ones left out).
    """

    class_names: tuple[str, ...]
    counts: dict[str, list[int]]
    totals: dict[str, int]
    width: SizeRange | None
    height: SizeRange | None
    imbalance: float


def summarise(dataset: ImageDataset, *, cache: Path | None = None) -> DatasetSummary:
    """Count and measure a data set.

    Sizes come from what `inspect_dataset` remembered under `cache`, else from the files' headers.
    """
    facts = read_facts(facts_file(dataset, cache)) if cache is not None else {}
    sizes = np.array(list(_sizes(dataset, facts)), dtype=np.int64).reshape(-1, 2)
    return DatasetSummary(
        class_names=dataset.class_names,
        counts={split: dataset.counts(split) for split in SPLITS},
        totals={split: len(dataset.splits[split]) for split in SPLITS},
        width=_size_range(sizes[:, 0]),
        height=_size_range(sizes[:, 1]),
        imbalance=_imbalance(dataset),
    )


def inspect_dataset(
    dataset: ImageDataset,
    *,
    workers: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Look at every image; the findings of `load_dataset` are not repeated.

    Args:
        workers: processes that decode; one for each core by default.
        cache: where results are remembered by content, so that a second look decodes nothing.
        progress: called with (images done, images to decode).

    Raises:
        VisiontunerError: a worker process died.
    """
    facts = inspect_images(dataset, workers=workers, cache=cache, progress=progress)
    findings = [
        find_unreadable(dataset, facts),
        *find_emptied_classes(dataset, _readable(dataset, facts)),
        *find_without_decoding(dataset),
        few_levels([s.path for _, s in _samples(dataset) if facts[s.digest].few_levels]),
        *find_odd(dataset, facts),
        find_tiny(dataset, facts),
        find_wrong_extensions(dataset, facts),
        find_near_across_splits(dataset, facts),
        find_near_across_groups(dataset, facts),
    ]
    return [finding for finding in findings if finding is not None]


def find_without_decoding(dataset: ImageDataset) -> list[Finding]:
    """What counts and content digests tell: imbalance, and the same file in two places."""
    found = find_imbalance(dataset), find_two_classes(dataset), find_same_across_splits(dataset)
    return [finding for finding in found if finding is not None]


def find_unreadable(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Images that cannot be decoded."""
    bad = [
        f"{sample.path}: {facts[sample.digest].error.rstrip('.')}"
        for _, sample in _samples(dataset)
        if facts[sample.digest].error
    ]
    return listed(
        "unreadable_images",
        "warning",
        bad,
        "cannot be decoded and will be skipped",
        "Replace or remove them; data.on_bad_image: fail stops at the first one instead.",
    )


def _readable(dataset: ImageDataset, facts: Facts) -> dict[str, list[int]]:
    """By split, the label of each image that can be decoded."""
    return {
        split: [sample.label for sample in samples if not facts[sample.digest].error]
        for split, samples in dataset.splits.items()
    }


def find_imbalance(dataset: ImageDataset) -> Finding | None:
    """A class with more than ten times the training images of another."""
    ratio = _imbalance(dataset)
    if ratio <= IMBALANCE_RATIO:
        return None
    counted = zip(dataset.counts("train"), dataset.class_names, strict=True)
    ranked = sorted(row for row in counted if row[0])
    few, many = ranked[0], ranked[-1]
    return Finding(
        rule="class_imbalance",
        severity="warning",
        evidence=f"{many[1]} has {many[0]} training images, {few[1]} has {few[0]}",
        advice="Set training.class_weights: balanced and judge by validation_macro_f1.",
    )


@dataclass(frozen=True, kw_only=True)
class OddImage:
    """An image that pixels or features speak against.

    Args:
        path: relative to the data's folder.
        label: the class it is given as.
        reason: `blank`, `odd-shaped`, `dark`, `blurred`, or `outlier` of its class.
        value: what was measured: brightness in [0, 255] of the blank and dark, the longer side by
            the shorter one, sharpness, robust standard deviations from its class.
    """

    path: str
    label: str
    reason: str
    value: float


def odd_images(dataset: ImageDataset, facts: Facts) -> list[OddImage]:
    """Blank, odd-shaped, dark and blurred images, each for the first of these reasons."""
    samples = [s for _, s in _samples(dataset) if not facts[s.digest].error]
    known = [facts[sample.digest] for sample in samples]
    dark = are_dark(np.array([one.brightness for one in known], dtype=np.float64))
    blurred = are_blurred(np.array([one.sharpness for one in known], dtype=np.float64))
    found: list[OddImage] = []
    for sample, one, is_dark, is_blurred in zip(samples, known, dark, blurred, strict=True):
        ratio = max(one.width, one.height) / min(one.width, one.height)
        reasons = {
            "blank": (one.few_levels, one.brightness),
            "odd-shaped": (ratio > LONG, round(ratio, 2)),
            "dark": (is_dark, one.brightness),
            "blurred": (is_blurred, one.sharpness),
        }
        fitting = ((reason, value) for reason, (fits, value) in reasons.items() if fits)
        for reason, value in islice(fitting, 1):
            label = dataset.class_names[sample.label]
            found.append(OddImage(path=sample.path, label=label, reason=reason, value=value))
    return found


def find_odd(dataset: ImageDataset, facts: Facts) -> list[Finding]:
    """Images that are odd-shaped, dark or blurred; blank ones have a finding of their own."""
    paths: dict[str, list[str]] = defaultdict(list)
    for image in odd_images(dataset, facts):
        paths[image.reason].append(image.path)
    look = "Look at them: the command `suspects` lists them in odd.csv."
    found = (
        listed(
            "odd_shaped_images",
            "info",
            paths["odd-shaped"],
            f"more than {LONG:g} times as long as wide, or as wide as long: much is cropped away",
            look,
        ),
        listed(
            "dark_images",
            "info",
            paths["dark"],
            f"95 % of the pixels are darker than {DARK} of 255, and the image half as bright as "
            "the others",
            look,
        ),
        listed(
            "blurred_images",
            "info",
            paths["blurred"],
            "no part is sharp, and the image half as sharp as the others",
            look,
        ),
    )
    return [finding for finding in found if finding is not None]


def find_tiny(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Images whose shorter side is below 32 pixels."""
    tiny = [
        sample.path
        for _, sample in _samples(dataset)
        if 0 < min(facts[sample.digest].width, facts[sample.digest].height) < TINY_PIXELS
    ]
    return listed(
        "tiny_images",
        "info",
        tiny,
        f"the shorter side has fewer than {TINY_PIXELS} pixels",
        "Look for thumbnails that came in by mistake.",
    )


def find_wrong_extensions(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Files whose ending names another format than their content."""
    endings = image_extensions()
    wrong = []
    for _, sample in _samples(dataset):
        found = facts[sample.digest].format
        said = endings[PurePosixPath(sample.path).suffix.lower()]
        if found and _SAME_FORMAT.get(found, found) != _SAME_FORMAT.get(said, said):
            wrong.append(f"{sample.path} is {found}")
    return listed(
        "wrong_extensions",
        "info",
        wrong,
        "the ending names another format; the images are read all the same",
        "Rename them if other programs are to read them.",
    )


def find_two_classes(dataset: ImageDataset) -> Finding | None:
    """The same file under two classes: one of the labels is wrong."""
    return listed(
        "same_image_in_two_classes",
        "warning",
        _same_apart(dataset, lambda _, sample: sample.label),
        "the same image with different labels",
        "Decide which label is right and remove the other file.",
    )


def find_same_across_splits(dataset: ImageDataset) -> Finding | None:
    """The same file in two splits: accuracy is measured on what was learned by heart."""
    return listed(
        "same_image_in_two_splits",
        "warning",
        _same_apart(dataset, lambda split, _: split),
        "the same image in two splits makes accuracy read too high",
        "Keep each image in one split.",
    )


def find_near_across_splits(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Nearly the same image in two splits: saved again, resized or brightened."""
    return listed(
        "near_duplicates_in_two_splits",
        "warning",
        _near_apart(_samples(dataset), facts),
        "nearly the same image in two splits makes accuracy read too high",
        "Look at the pairs and keep each image in one split.",
    )


def find_near_across_groups(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Nearly the same image in two groups, which then may be one."""
    grouped = [(s.group, s) for _, s in _samples(dataset) if s.group is not None]
    return listed(
        "near_duplicates_in_two_groups",
        "warning",
        _near_apart(grouped, facts),
        "nearly the same image in two groups, so that they may lie in two splits",
        "Look at the pairs; if they show the same, give both the same group.",
    )


def _near_apart(placed: Iterable[tuple[str, Sample]], facts: Facts) -> list[str]:
    """Nearly equal images in two places, a pair for each two hashes."""
    # Equal hashes once: a thousand blank images are one entry, not half a million pairs.
    holders: dict[str, dict[str, Sample]] = defaultdict(dict)
    for place, sample in placed:
        if perceptual_hash := facts[sample.digest].perceptual_hash:
            holders[perceptual_hash].setdefault(place, sample)
    hashes = list(holders)
    pairs = [(text, text) for text in hashes if len(holders[text]) > 1]
    pairs += [(hashes[i], hashes[j]) for i, j in near_pairs(hashes, NEAR_BITS)]
    return [name for a, b in pairs if (name := _near_name(holders[a], holders[b]))]


def _near_name(first: Mapping[str, Sample], second: Mapping[str, Sample]) -> str | None:
    for place, sample in first.items():
        for other_place, other in second.items():
            if place != other_place and sample.digest != other.digest:
                return f"{sample.path} ~ {other.path}"
    return None


def _samples(dataset: ImageDataset) -> Iterator[tuple[str, Sample]]:
    for split in SPLITS:
        for sample in dataset.splits[split]:
            yield split, sample


def _same_apart(dataset: ImageDataset, place: Callable[[str, Sample], object]) -> list[str]:
    """Files of equal content in several places: one path from each, joined by `=`."""
    groups: dict[str, dict[object, str]] = defaultdict(dict)
    for split, sample in _samples(dataset):
        groups[sample.digest][place(split, sample)] = sample.path
    return [" = ".join(paths.values()) for paths in groups.values() if len(paths) > 1]


def _imbalance(dataset: ImageDataset) -> float:
    counts = [count for count in dataset.counts("train") if count]
    return max(counts) / min(counts)


def _sizes(dataset: ImageDataset, facts: Facts) -> Iterator[tuple[int, int]]:
    for _, sample in _samples(dataset):
        known = facts.get(sample.digest)
        if known is None:
            try:
                _, width, height = read_header(dataset.root / sample.path)
            except BadImageError:
                continue
            yield width, height
        elif known.width:
            yield known.width, known.height


def _size_range(lengths: NDArray[np.int64]) -> SizeRange | None:
    if not len(lengths):
        return None
    return SizeRange(int(lengths.min()), float(np.median(lengths)), int(lengths.max()))
