"""The artifact that is served: images in, named probabilities out, in a folder without pickles.

    classifier.json        class names, preprocessing, temperature, threshold, abstains, metadata
    model.onnx             "image" float32 (B, 3, size, size) -> "logits" float32 (B, num_classes),
                           "features" float32 (B, D) and, of a network whose features are the mean
                           of a map, "feature_map" float32 (B, D, height, width)
    weights.safetensors    the same weights, for training on
    reference.json         some images with the probabilities that this very artifact gave
    novelty.npz            a sample of training images' features, see `model/novelty.py`; not there
                           where nothing says which images are known

Needs numpy, Pillow and ONNX Runtime; no torch. Format 1 had "logits" alone; it still loads.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeGuard

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from visiontuner.data.images import (
    MAX_PIXELS,
    DecodingMemory,
    Preprocessing,
    normalise,
    read_pixels,
)
from visiontuner.errors import BadImageError, ClassifierError, LargeImageError
from visiontuner.model.novelty import Novelty

SCHEMA_VERSION = 2
DESCRIPTION = "classifier.json"
NETWORK = "model.onnx"
WEIGHTS = "weights.safetensors"
REFERENCE = "reference.json"
NOVELTY = "novelty.npz"
# The network's outputs.
LOGITS, FEATURES, FEATURE_MAP = "logits", "features", "feature_map"

# In int8 a last digit tips roundings, so that other processors answer visibly otherwise. Computed
# by OpenVINO, the probabilities of 120 photographs differed by 0.087 at most and no class did.
INT8_TOLERANCE = 0.1

# With 32 a network of 4.6M parameters holds 170 MB more and is hardly faster.
_BATCH_SIZE = 4  # see model/engine.py


ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image.

    Args:
        label: the most probable class's name.
        probability: its probability, in [0, 1].
        top_k: (name, probability) of the most probable classes, best first.
        confident: whether the probability reaches the threshold; always without a threshold, and
            never where every answer abstains.
        known: whether the image is like the training images, as 95 % of images of the classes are;
            None where the classifier cannot tell.
        novelty: how unlike them it is, in [0, 2]; None where `known` is.
    """

    label: str
    probability: float
    top_k: list[tuple[str, float]]
    confident: bool
    known: bool | None = None
    novelty: float | None = None


class Scores(NamedTuple):
    """What a classifier says of B images.

    Args:
        probabilities: float64, shape (B, num_classes); NaN where an image cannot be read.
        novelty: float64, shape (B,); NaN there, and where the classifier cannot tell.
        errors: B reasons why an image cannot be read, or None.
    """

    probabilities: NDArray[np.float64]
    novelty: NDArray[np.float64]
    errors: list[BadImageError | None]

    def raise_first(self) -> None:
        """Raise the first error, if there is one."""
        for error in filter(None, self.errors):
            raise error


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained classifier, loaded from its folder.

    Args:
        class_names: in the order of the logits.
        temperature: logits are divided by it before the softmax.
        threshold: below this probability an answer should not be trusted; None if unset.
        abstains: no threshold reached the wanted precision, so no answer should be trusted.
        metadata: where it came from; plain JSON values.
        novelty: tells which images are known; None in format 1, and where nothing could.
    """

    folder: Path
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float = 1.0
    threshold: float | None = None
    abstains: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    novelty: Novelty | None = field(default=None, repr=False, compare=False)
    session: onnxruntime.InferenceSession = field(repr=False, compare=False)
    threads: int

    @classmethod
    def load(cls, folder: str | Path, *, threads: int | None = None) -> Self:
        """Open a classifier folder.

        Args:
            threads: CPU threads for the network and for decoding; default: at most 4 of the cores
                that this process may use.

        Raises:
            ClassifierError: a file is missing or damaged, or they do not belong together.
        """
        folder = Path(folder)
        raw = _read_json(folder, DESCRIPTION)
        threads = threads or min(4, _available_cpus())
        try:
            classifier = cls(
                folder=folder,
                **_checked(raw),
                novelty=_read_novelty(folder, raw.get("novelty")),
                session=_open_session(folder / NETWORK, threads),
                threads=threads,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(folder, DESCRIPTION, error) from None
        _check_network(classifier)
        return classifier

    def predict(
        self, images: ImageSource | Iterable[ImageSource], *, top_k: int = 5
    ) -> list[Prediction]:
        """Name what is on each image.

        Args:
            images: paths, contents of files (in any format of `images.image_extensions`), PIL
                images, or arrays: uint8, shape (H, W, 3) RGB or (H, W) grey; one or many.
            top_k: how many classes to list; at most all.

        Raises:
            BadImageError: an image cannot be read; none is answered then.
            ValueError: top_k is below 1, or an array has another shape or dtype.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        is_one = isinstance(images, str | bytes | Path | Image.Image)
        many: Any = [images] if is_one or (_is_array(images) and images.ndim < 4) else images
        scores = self.score([_as_file(image) for image in many])
        scores.raise_first()
        return [
            self.prediction(row, top_k, novelty=novelty)
            for row, novelty in zip(scores.probabilities, scores.novelty, strict=True)
        ]

    def probabilities(self, images: Sequence[bytes | Path]) -> NDArray[np.float64]:
        """Class probabilities of each image.

        Returns:
            float64, shape (B, num_classes); rows sum to 1.

        Raises:
            BadImageError: an image cannot be read.
        """
        scores = self.score(images)
        scores.raise_first()
        return scores.probabilities

    def score(
        self,
        images: Sequence[bytes | Path],
        *,
        max_pixels: int = MAX_PIXELS,
        memory: DecodingMemory | None = None,
    ) -> Scores:
        """Probabilities and novelty of images that can be read, and what is wrong with the others.

        Args:
            max_pixels: larger images are not decoded.
            memory: shared by all calls that may run at a time; no bound if None.

        Raises:
            BusyError: too many other calls wait to decode large images.
        """
        read_small = partial(
            self._read, max_pixels=max_pixels, max_bytes=memory.small if memory else None
        )
        rows = np.full((len(images), len(self.class_names)), np.nan)
        novelty = np.full(len(images), np.nan)
        errors: list[BadImageError | None] = []
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            # One image is decoded before a thread has started.
            each = pool.map if len(images) > 1 else map
            for start in range(0, len(images), _BATCH_SIZE):
                batch = images[start : start + _BATCH_SIZE]
                read = list(each(read_small, batch))
                for position, one in enumerate(read):
                    if memory is not None and isinstance(one, LargeImageError):
                        with memory.turn():
                            read[position] = self._read(
                                batch[position], max_pixels=max_pixels, max_bytes=memory.most
                            )
                errors += [None if isinstance(one, np.ndarray) else one for one in read]
                good = [i for i, one in enumerate(read, start) if isinstance(one, np.ndarray)]
                if good:
                    pixels = np.stack([one for one in read if isinstance(one, np.ndarray)])
                    rows[good], novelty[good] = self._score_pixels(pixels)
        return Scores(rows, novelty, errors)

    def _score_pixels(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self.novelty is None:
            return softmax(self.logits(pixels) / self.temperature), np.full(len(pixels), np.nan)
        logits, features = self.outputs(pixels, [LOGITS, FEATURES])
        rows = softmax(logits.astype(np.float64) / self.temperature)
        return rows, self.novelty.scores(features)

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The network's raw answers.

        Args:
            pixels: uint8, shape (B, size, size, 3).

        Returns:
            float64, shape (B, num_classes).
        """
        (logits,) = self.outputs(pixels, [LOGITS])
        return np.asarray(logits, dtype=np.float64)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What `outputs` can be asked for: `LOGITS`, and from format 2 on more."""
        return tuple(node.name for node in self.session.get_outputs())

    def outputs(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> list[NDArray[np.float32]]:
        """Some of the network's outputs, all in one run.

        Args:
            pixels: uint8, shape (B, size, size, 3).
            names: some of `output_names`.

        Returns:
            float32; logits (B, num_classes), features (B, D), feature_map (B, D, height, width).
        """
        image = normalise(pixels, self.preprocessing)
        found: list[NDArray[np.float32]] = self.session.run(list(names), {"image": image})
        return found

    @property
    def is_int8(self) -> bool:
        """Whether the network was quantised."""
        return "quantization" in self.metadata

    def warm_up(self) -> None:
        """Load what the first image, and the first that cannot be read, would wait for."""
        size = self.preprocessing.size
        self._score_pixels(np.zeros((1, size, size, 3), np.uint8))
        self.score([b"no image"])

    def verify_reference(self) -> float:
        """Answer the reference images again.

        Returns:
            The largest absolute difference from the recorded probabilities; about 0 on the machine
            that packaged it; on others below 1e-4, or in int8 `INT8_TOLERANCE`.

        Raises:
            ClassifierError: `reference.json` is missing or damaged.
        """
        raw = _read_json(self.folder, REFERENCE)
        try:
            contents = [base64.b64decode(p["image"], validate=True) for p in reference_entries(raw)]
            recorded = np.array(
                [p["probabilities"] for p in reference_entries(raw)], dtype=np.float64
            )
            if recorded.shape != (len(contents), len(self.class_names)) or not contents:
                raise ValueError("it has no images, or other classes")
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(self.folder, REFERENCE, error) from None
        return float(np.abs(self.probabilities(contents) - recorded).max())

    def _read(
        self, image: bytes | Path, *, max_pixels: int, max_bytes: int | None
    ) -> NDArray[np.uint8] | BadImageError:
        try:
            return read_pixels(
                image, self.preprocessing, max_pixels=max_pixels, max_bytes=max_bytes
            )
        except BadImageError as error:
            return error

    def prediction(
        self,
        row: NDArray[np.float64],
        top_k: int,
        *,
        threshold: float | None = None,
        novelty: float = math.nan,
    ) -> Prediction:
        """Names for one image's probabilities.

        Args:
            row: float64, shape (num_classes,).
            threshold: counts instead of the classifier's threshold and `abstains`; None for these.
            novelty: as `score` gives it.
        """
        # Stable: of equals, the first in the order of the class names.
        order = np.argsort(-row, kind="stable")[:top_k]
        best = [(self.class_names[i], float(row[i])) for i in order]
        (label, probability), *_ = best
        confident = threshold is not None or not self.abstains
        limit = self.threshold if threshold is None else threshold
        return Prediction(
            label=label,
            probability=probability,
            top_k=best,
            confident=confident and (limit is None or probability >= limit),
            known=None if self.novelty is None else bool(novelty <= self.novelty.threshold),
            novelty=None if self.novelty is None else float(novelty),
        )


def _is_array(value: object) -> TypeGuard[NDArray[Any]]:
    return isinstance(value, np.ndarray)


def _as_file(image: ImageSource) -> bytes | Path:
    """What `images.decode_image` takes: PIL images and arrays become PNG, which loses nothing."""
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, bytes | Path):
        return image
    if _is_array(image):
        if image.dtype != np.uint8 or not (
            image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        ):
            raise ValueError(
                "An array must be uint8 of shape (H, W, 3) or (H, W), "
                f"got {image.dtype} of shape {image.shape}."
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    assert isinstance(image, Image.Image)
    content = io.BytesIO()
    exif = image.getexif()
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    image.save(content, "PNG", compress_level=1, exif=exif)
    return content.getvalue()


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities from logits, shape (B, num_classes); rows sum to 1."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


def read_threshold(raw: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Threshold and `abstains` as `classifier.json`, or a journal's calibration, holds them.

    Before there was a flag, a threshold of 1.0 stood for it, which a softmax of exactly 1.0 passed.
    A 1.0 that was really chosen has the precision beside it that it reached on validation.

    Raises:
        ValueError: they are no threshold and no flag, or both.
    """
    threshold, abstains = raw["threshold"], raw.get("abstains")
    if threshold is not None and not 0 <= float(threshold) <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if abstains is None:
        calibration = (raw.get("metadata") or {}).get("calibration") or {}
        if threshold == 1 and calibration.get("validation_precision") is None:
            return None, True
    if abstains not in (None, False, True) or (abstains and threshold is not None):
        raise ValueError(f"abstains must be false, or true without a threshold, got {abstains}")
    return None if threshold is None else float(threshold), bool(abstains)


def reference_entries(reference: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a `reference.json`, one of an earlier version included."""
    images: list[dict[str, Any]] = reference["images" if "images" in reference else "pictures"]
    return images


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ClassifierError(
            f"{folder} is no classifier: cannot read {name} ({error.strerror})."
        ) from None
    except ValueError as error:
        raise _damaged(folder, name, error) from None
    if not isinstance(raw, dict):
        raise _damaged(folder, name, TypeError("it is not an object"))
    version = raw.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ClassifierError(
            f"{folder / name} was written by a newer visiontuner (schema {version}); "
            "update this one."
        )
    return raw


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = raw["class_names"]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names must be a list of names")
    if len(set(names)) != len(names):
        raise ValueError("class_names must not repeat")
    temperature = float(raw["temperature"])
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be > 0, got {temperature}")
    threshold, abstains = read_threshold(raw)
    return {
        "class_names": tuple(names),
        "preprocessing": Preprocessing.from_dict(raw["preprocessing"]),
        "temperature": temperature,
        "threshold": threshold,
        "abstains": abstains,
        "metadata": dict(raw["metadata"]),
    }


def _read_novelty(folder: Path, raw: dict[str, Any] | None) -> Novelty | None:
    """The sample and the threshold that belong together; None where the description has none."""
    if raw is None:
        return None
    try:
        return Novelty.load(folder / NOVELTY, raw)
    except OSError as error:
        raise ClassifierError(
            f"{folder} is no classifier: cannot read {NOVELTY} ({error.strerror})."
        ) from None
    except (ValueError, TypeError, LookupError) as error:
        raise _damaged(folder, NOVELTY, error) from None


def _open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise ClassifierError(f"{path.parent} is no classifier: it has no {path.name}.")
    try:
        return open_on_cpu(path, threads)
    except Exception as error:  # onnxruntime's classes share no base
        raise _damaged(path.parent, path.name, type(error)()) from None


def open_on_cpu(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session in which so many threads work on a call, who calls it among them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised
    # Threads that wait would spin, and take the cores from those that decode or answer.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _check_network(classifier: Classifier) -> None:
    size, count = classifier.preprocessing.size, len(classifier.class_names)
    session = classifier.session
    inputs = {node.name: node.shape[1:] for node in session.get_inputs()}
    outputs = {node.name: node.shape[1:] for node in session.get_outputs()}
    if inputs != {"image": [3, size, size]} or outputs.get(LOGITS) != [count]:
        raise ClassifierError(
            f"{classifier.folder / NETWORK} takes {inputs} and gives {outputs}; {DESCRIPTION} "
            f"needs image {[3, size, size]} and logits {[count]}. Package the classifier again."
        )
    novelty = classifier.novelty
    if novelty is not None and outputs.get(FEATURES) != [novelty.feature_dim]:
        raise ClassifierError(
            f"{classifier.folder / NETWORK} gives {outputs}; {NOVELTY} needs features "
            f"{[novelty.feature_dim]}. Package the classifier again."
        )


def _damaged(folder: Path, name: str, error: Exception) -> ClassifierError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ClassifierError(f"{folder / name} is damaged ({reason}). Package the classifier again.")


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
