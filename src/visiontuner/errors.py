"""The exceptions a caller can meet.

Every message is one or two sentences: the value, the rule it breaks and the next step. The command
line prints the message alone and exits with `exit_code`: 2 for a user's mistake, 1 for a failure.
"""

from __future__ import annotations


class VisiontunerError(Exception):
    """Anything visiontuner raises on purpose."""

    exit_code = 1


class UserMistake(VisiontunerError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class ExperimentError(UserMistake):
    """An experiment file or an override that breaks a rule."""


class DataError(UserMistake):
    """A data source that cannot be read as an image data set."""


class BadImageError(DataError):
    """One image that cannot be decoded: truncated, not an image, or too large."""


class LargeImageError(BadImageError):
    """One image whose decoding needs more memory than allowed."""


class BusyError(VisiontunerError):
    """Too many large images at a time; the same request is answered later."""


class BackboneError(UserMistake):
    """An unknown backbone, or weights that do not fit it."""


class WeightsAway(BackboneError):
    """Pretrained weights that cannot be had now: not installed, or not downloaded."""


class ClassifierError(UserMistake):
    """A classifier folder that is missing, incomplete or damaged."""


class JournalError(UserMistake):
    """A search folder without a readable journal."""


class CheckpointError(UserMistake):
    """A checkpoint that is damaged, or of another network, class list or setting."""


class DownloadError(VisiontunerError):
    """A download that did not end, or ended with other bytes than promised."""


class ExportError(VisiontunerError):
    """A network that cannot be written as ONNX, or whose ONNX form answers differently."""


class TrialFailed(VisiontunerError):
    """One trial cannot go on (its loss is not finite, say); the search can.

    Args:
        deterministic: going on from the last epoch fails in the same way.
    """

    def __init__(self, message: str, *, deterministic: bool = False) -> None:
        super().__init__(message)
        self.deterministic = deterministic


class DiskError(VisiontunerError):
    """A disk that is full, over its quota or broken: the same goes on where there is room."""


class SearchFailed(VisiontunerError):
    """The whole search cannot go on, or ended without one usable trial."""


class SearchInterrupted(VisiontunerError):
    """The search was stopped in order before it was done; it can be resumed."""

    exit_code = 130


class TrackingError(VisiontunerError):
    """MLflow is away, refuses, or holds something that does not fit."""


class ServingError(VisiontunerError):
    """An endpoint or scoring server that does not answer, or answers wrongly."""


class JobFailed(VisiontunerError):
    """A training job that cannot be submitted, or that ended without a search."""
