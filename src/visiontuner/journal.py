"""The append-only record of a search: the contract between search and tracking.

`journal.jsonl` holds one JSON object a line. A line is whole or it is ignored: a kill may tear the
last one. Every line has `schema_version`, `event`, `search_id` and `time` (seconds since the
epoch); lines about a trial have `trial_id` and `attempt`. The events and what else they carry:

    search_started   experiment, data, code, machine      the first line; of a single training also
                     trained_on; from: where its hyperparameters come from, or which search it
                     began with (description, first, told, …)
    search_resumed   code, machine                        one for each `--resume`
    features_ready   backbone, weights_digest, weights_licence, feature_dim, engine, computed,
                     seconds, folder; one for each network that is searched
    network_left_out backbone, reason                     its weights cannot be had, say
    network_stopped  backbone, reason, trials             it gets no more trials
    baseline_ended   name, configuration, metrics, seconds
    choice_made      chosen, best, tied, reason, estimate
    images_ready     backbone, weights_digest, weights_licence, feature_dim, computed, seconds,
                     folder
    trial_started    configuration; stage and starts_from (a trial) where `search.stages` is set
    epoch            step (1 is the first epoch), metrics
    finding          rule, severity, step, evidence, advice
    trial_ended      state, best_epoch, best_value (of the epoch that is kept, whether or not
                     another one was better), error, reason, host
    search_ended     state, best_trial, error

No line holds a password or a signature of a URL: what a search needs of them is in its experiment
file, which then is its owner's alone.

`SearchRecord` folds the lines into the state of the search: a pure function of what was read.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from visiontuner.errors import JournalError, SearchFailed
from visiontuner.io.files import encode_json
from visiontuner.paths import CLASSIFIER_FOLDER, JOURNAL_FILE, SEARCHES
from visiontuner.text import hide_secrets


def newest_search(searches: Path = SEARCHES) -> Path:
    """The search folder whose journal was written last.

    Raises:
        JournalError: there is none.
    """
    journals = list(searches.glob(f"*/{JOURNAL_FILE}"))
    if not journals:
        raise JournalError(f"There is no search in {searches}/ yet; `visiontuner tune` makes one.")
    return max(journals, key=lambda journal: journal.stat().st_mtime).parent


# The numbers of one epoch, without torch: the driver of a search reads them, workers make them.


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """The numbers of one epoch; `docs/tracking.md` describes each."""

    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    validation_macro_f1: float
    learning_rate: float
    gradient_norm: float
    epoch_seconds: float
    images_per_second: float
    # Standard deviations over the folds of a cross-validation.
    validation_accuracy_spread: float | None = None
    validation_loss_spread: float | None = None

    def to_dict(self) -> dict[str, float]:
        """What was measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


SCHEMA_VERSION = 1

Event = dict[str, Any]
TrialState = Literal["running", "completed", "stopped_early", "failed", "interrupted"]
FINISHED: tuple[TrialState, ...] = ("completed", "stopped_early", "failed")
Severity = Literal["info", "warning", "error"]
StageName = Literal["head", "network"]
NETWORK_FACTS = ("backbone", "weights_digest", "weights_licence", "engine")
"""What `features_ready` says of a network, under the names that MLflow's tags have."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something a rule noticed in the data or in a training, and what to do about it."""

    rule: str
    severity: Severity
    evidence: str
    advice: str
    step: int | None = None

    def __post_init__(self) -> None:
        # Stores and journals of earlier versions have the rules' names of then.
        object.__setattr__(self, "rule", _renamed(self.rule))

    def to_dict(self) -> dict[str, Any]:
        """What a journal line says of it; not what a subclass adds."""
        return {name: getattr(self, name) for name in Finding.__dataclass_fields__}


class JournalWriter:
    """Appends whole lines; the only one that writes a search's journal.

    A torn last line, left by a kill, is cut off before the first append. Every event but `epoch` is
    on the disk when `append` returns. The journal is locked until `close` or the process's end,
    `kill -9` included.

    Raises:
        JournalError: another process is writing this journal.
        SearchFailed: the folder or the line cannot be written; the journal stays whole.
    """

    def __init__(
        self, folder: Path, search_id: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = folder / JOURNAL_FILE
        self._search_id = search_id
        self._clock = clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise SearchFailed(
                f"Cannot write {self.path}: {error.strerror}. Name another --output folder."
            ) from None
        try:
            _lock(self._descriptor, self.path)
            _cut_torn_tail(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event and return it as a reader will see it."""
        line: Event = {
            "schema_version": SCHEMA_VERSION,
            "event": event,
            "search_id": self._search_id,
            "time": round(self._clock(), 3),
            **fields,
        }
        content = encode_json(_without_nonfinite(hide_secrets(line)))
        whole = os.fstat(self._descriptor).st_size
        try:
            _write_all(self._descriptor, content + b"\n")
            if event != "epoch":
                os.fsync(self._descriptor)
        except OSError as error:
            # Half a line in the middle would cost the whole journal.
            os.ftruncate(self._descriptor, whole)
            raise SearchFailed(
                f"Cannot write {self.path}: {error.strerror}. What it holds is whole: "
                f"make room, then repeat the command with --resume {self.path.parent}."
            ) from None
        return _with_nonfinite(json.loads(content))

    def close(self) -> None:
        """Release the journal's lock; closing twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_running(folder: Path) -> bool:
    """Whether a process is writing this search's journal now; a dead one's lock is gone."""
    path = folder / JOURNAL_FILE
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        _lock(descriptor, path)
    except JournalError:
        return True
    finally:
        os.close(descriptor)
    return False


class Read(NamedTuple):
    """Events, and the byte offset where the next reading goes on."""

    events: list[Event]
    offset: int


def read_events(folder: Path, offset: int = 0) -> Read:
    """The whole lines of a search's journal from a byte offset on.

    Raises:
        JournalError: there is no journal, or a line in its middle is damaged.
    """
    path = folder / JOURNAL_FILE
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except OSError as error:
        raise JournalError(
            f"{folder} is no search folder: cannot read {JOURNAL_FILE} ({error.strerror})."
        ) from None
    end = content.rfind(b"\n") + 1
    events = [_parse(line, path) for line in content[:end].split(b"\n") if line.strip()]
    return Read(events, offset + end)


@dataclass(kw_only=True)
class EpochRecord:
    """One epoch of one trial as it was reported."""

    step: int
    time: float
    attempt: int
    metrics: dict[str, float]


@dataclass(kw_only=True)
class TrialRecord:
    """One trial, all attempts together.

    The epochs are those of the last attempt; where that one went on from a checkpoint, with those
    of earlier attempts up to there. `stage` and `starts_from`, the trial whose head it began with,
    are given in a search with two stages.
    """

    trial_id: str
    configuration: dict[str, Any]
    attempt: int
    state: TrialState
    started: float
    ended: float | None = None
    best_epoch: int | None = None
    best_value: float | None = None
    error: str | None = None
    reason: str | None = None
    epochs: list[EpochRecord] = field(default_factory=list, repr=False)
    findings: list[Finding] = field(default_factory=list, repr=False)
    stage: StageName | None = None
    starts_from: str | None = None
    earlier_epochs: list[EpochRecord] = field(default_factory=list, repr=False)
    host: str | None = None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    def epochs_before(self, step: int) -> list[EpochRecord]:
        """Those before an epoch that is reported now.

        If it is this attempt's first, it went on from a checkpoint: those of the attempts before.
        """
        return self.epochs or _up_to(step, self.earlier_epochs)

    def kept(self, metric: str) -> float | None:
        """A metric of the epoch that is kept."""
        values = (e.metrics.get(metric) for e in self.epochs if e.step == self.best_epoch)
        return next(values, None)

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, in order."""
        rows = [(e.step, e.metrics[metric]) for e in self.epochs if metric in e.metrics]
        return [step for step, _ in rows], [value for _, value in rows]


@dataclass(kw_only=True)
class SearchRecord:
    """The state of a search: a fold over its journal's events.

    `preparation_seconds` went into features and decoded images before the first trial.
    `baselines` are what trials are compared with, by name; they are no trials and have no epochs.
    `choice` is the last `choice_made`. `networks` are by name what is known of each pretrained
    network, as the first event about it says: a resumed search finds its features in the cache.
    `left_out` are networks that get no trials, and why; `stopped` those that get no more, by the
    event that says so.
    """

    search_id: str = ""
    started: Event = field(default_factory=dict, repr=False)
    ended: Event | None = field(default=None, repr=False)
    trials: dict[str, TrialRecord] = field(default_factory=dict, repr=False)
    preparation_seconds: float = 0.0
    baselines: dict[str, TrialRecord] = field(default_factory=dict, repr=False)
    choice: Event | None = field(default=None, repr=False)
    networks: dict[str, Event] = field(default_factory=dict, repr=False)
    left_out: dict[str, str] = field(default_factory=dict, repr=False)
    stopped: dict[str, Event] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path) -> SearchRecord:
        return cls.of(read_events(folder).events)

    @classmethod
    def of(cls, events: Iterable[Event]) -> SearchRecord:
        record = cls()
        for event in events:
            record.apply(event)
        return record

    def apply(self, event: Event) -> None:
        """Take in one more event."""
        kind = event["event"]
        if kind == "search_started":
            self.search_id, self.started = event["search_id"], event
        elif kind == "search_resumed":
            self.ended = None
            for trial in self.trials.values():
                if trial.state == "running":
                    trial.state = "interrupted"
        elif kind in ("features_ready", "images_ready"):
            self.networks.setdefault(str(event.get("backbone")), event)
            if not self.trials:
                self.preparation_seconds += float(event.get("seconds") or 0.0)
        elif kind == "network_left_out":
            self.left_out[event["backbone"]] = event["reason"]
        elif kind == "network_stopped":
            self.stopped[event["backbone"]] = event
        elif kind == "search_ended":
            self.ended = event
        elif kind == "baseline_ended":
            self.baselines[event["name"]] = _baseline(event, self.objective)
        elif kind == "choice_made":
            self.choice = event
        elif kind == "trial_started":
            self._start(event)
        elif event.get("trial_id") in self.trials:
            _apply_to_trial(self.trials[event["trial_id"]], event)

    @property
    def mode(self) -> Literal["min", "max"]:
        return "min" if self.objective == "validation_loss" else "max"

    @property
    def objective(self) -> str:
        return str(self.started.get("experiment", {}).get("objective", "validation_accuracy"))

    @property
    def folds(self) -> int | None:
        """Folds of the cross-validation that judged its trials; None for a hold-out."""
        data = self.started.get("experiment", {}).get("data", {})
        return data.get("folds") if data.get("validation") == "folds" else None

    @property
    def is_training(self) -> bool:
        """Whether it is one training of `visiontuner train`, and no search."""
        return "trained_on" in self.started

    @property
    def is_unvalidated(self) -> bool:
        """Whether the validation images were trained on: then nothing was measured on them."""
        return bool(self.started.get("trained_on", "train") != "train")

    def epochs_of(self, trial: TrialRecord) -> int:
        """How many epochs the trial was to run: its own value, its stage's or the experiment's."""
        experiment = self.started.get("experiment", {})
        training, search = experiment.get("training", {}), experiment.get("search", {})
        epochs = training.get("epochs", 0)
        if trial.stage == "network":
            epochs = (search.get("stages") or {}).get("epochs", epochs)
        return int(trial.configuration.get("epochs", epochs))

    def kept_epoch(self, trial: TrialRecord) -> EpochRecord | None:
        """The epoch whose weights are kept: the last, where the learning rate falls to zero in it.

        Otherwise it is the one with the lowest validation loss.
        """
        training = self.started.get("experiment", {}).get("training", {})
        falls = training.get("schedule", "cosine") == "cosine"
        if self.is_unvalidated or (falls and training.get("early_stop") is None):
            return trial.epochs[-1] if trial.epochs else None
        return _lowest_loss(trial.epochs)

    def ran_to_its_end(self, trial: TrialRecord) -> bool:
        """Whether a trial has all its epochs, or stopped itself; no scheduler or rule ended it."""
        if trial.state != "stopped_early":
            return trial.state == "completed"
        patience = self.started.get("experiment", {}).get("training", {}).get("early_stop")
        if patience is None or not trial.epochs or trial.best_epoch is None:
            return False
        return trial.reason is None and trial.epochs[-1].step - trial.best_epoch >= int(patience)

    def ranking(self) -> list[TrialRecord]:
        """Usable trials, best first: ended in order, with a finite value.

        Those that ran to their end come first, by the objective, then by validation loss, training
        seconds and id; the others follow, the furthest first. A training on the validation images
        too has no value, and is usable.
        """
        usable = [
            t
            for t in self.trials.values()
            if t.state in ("completed", "stopped_early")
            and (
                math.isfinite(math.nan if t.best_value is None else t.best_value)
                or self.is_unvalidated
            )
        ]
        return sorted(usable, key=self._place)

    def _place(self, trial: TrialRecord) -> tuple[object, ...]:
        sign = 1 if self.mode == "min" else -1
        whole = self.ran_to_its_end(trial)
        loss = trial.kept("validation_loss")
        _, seconds = trial.curve("epoch_seconds")
        return (
            not whole,
            0 if whole else -len(trial.epochs),
            sign * (trial.best_value or 0.0),
            math.inf if loss is None or math.isnan(loss) else loss,
            sum(seconds),
            trial.trial_id,
        )

    @property
    def best(self) -> TrialRecord | None:
        """The first of the ranking."""
        ranking = self.ranking()
        return ranking[0] if ranking else None

    def named(self, name: str | None) -> TrialRecord | None:
        """A trial by its id, or a baseline by its name."""
        return self.trials.get(name or "") or self.baselines.get(name or "")

    @property
    def kept(self) -> TrialRecord | None:
        """The trial or baseline that becomes the model: the chosen one, before a choice the best.

        A search that was resumed has chosen among the trials of before.
        """
        chosen = str(self.choice["chosen"]) if self.choice is not None else None
        return self.named(chosen) or self.best

    def best_by_network(self) -> dict[str, TrialRecord]:
        """The best usable trial of each network that is searched, the best network first."""
        found: dict[str, TrialRecord] = {}
        for trial in self.ranking():
            if (name := trial.configuration.get("backbone")) is not None:
                found.setdefault(str(name), trial)
        return found

    def network_of(self, trial: TrialRecord | None) -> dict[str, Any]:
        """Facts of a trial's pretrained network: backbone, its weights, what ran it.

        Without a trial, of the first one of the search.
        """
        name = None if trial is None else trial.configuration.get("backbone")
        first = next(iter(self.networks.values()), None)
        event = self.networks.get(str(name)) or first or self.started.get("features") or {}
        return {key: event[key] for key in NETWORK_FACTS if event.get(key) is not None}

    def searching(self) -> SearchRecord:
        """The same search with the trials that searched the space: without a second stage's."""
        searched = {i: trial for i, trial in self.trials.items() if trial.stage != "network"}
        return replace(self, trials=searched)

    def _start(self, event: Event) -> None:
        previous = self.trials.get(event["trial_id"])
        self.trials[event["trial_id"]] = TrialRecord(
            trial_id=event["trial_id"],
            configuration=event["configuration"],
            attempt=event["attempt"],
            state="running",
            started=previous.started if previous else event["time"],
            stage=event.get("stage"),
            starts_from=event.get("starts_from"),
            earlier_epochs=[*previous.earlier_epochs, *previous.epochs] if previous else [],
        )


def packaged_trial(folder: Path) -> str | None:
    """The id of the trial that `classifier/` was made from; None without a readable one."""
    try:
        text = (folder / CLASSIFIER_FOLDER / "classifier.json").read_text(encoding="utf-8")
        metadata: dict[str, Any] = json.loads(text)["metadata"]
        return str(metadata["trial_id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _lowest_loss(epochs: Iterable[EpochRecord]) -> EpochRecord | None:
    """The epoch with the lowest finite validation loss; the earliest of equals."""
    usable = [e for e in epochs if math.isfinite(e.metrics.get("validation_loss", math.nan))]
    return min(usable, key=lambda e: (e.metrics["validation_loss"], e.step), default=None)


def _baseline(event: Event, objective: str) -> TrialRecord:
    """A baseline as a trial of one epoch."""
    epoch = EpochRecord(step=1, time=event["time"], attempt=1, metrics=event["metrics"])
    return TrialRecord(
        trial_id=event["name"],
        configuration=event["configuration"],
        attempt=1,
        state="completed",
        started=event["time"] - event["seconds"],
        ended=event["time"],
        best_epoch=1,
        best_value=event["metrics"].get(objective),
        epochs=[epoch],
    )


def _apply_to_trial(trial: TrialRecord, event: Event) -> None:
    if event["event"] == "epoch":
        trial.epochs = trial.epochs_before(event["step"])
        trial.epochs.append(
            EpochRecord(
                step=event["step"],
                time=event["time"],
                attempt=event["attempt"],
                metrics=event["metrics"],
            )
        )
    elif event["event"] == "finding":
        trial.findings.append(
            Finding(**{k: event.get(k) for k in Finding.__dataclass_fields__})  # type: ignore[arg-type]
        )
    elif event["event"] == "trial_ended":
        trial.state = event["state"]
        trial.ended = event["time"]
        trial.best_epoch = event.get("best_epoch")
        trial.best_value = event.get("best_value")
        trial.error = event.get("error")
        trial.reason = event.get("reason")
        trial.host = event.get("host")


def _up_to(step: int, epochs: Iterable[EpochRecord]) -> list[EpochRecord]:
    """The epochs before a step, each as the latest attempt had it."""
    latest = {epoch.step: epoch for epoch in epochs if epoch.step < step}
    return [latest[known] for known in sorted(latest)]


def _parse(line: bytes, path: Path) -> Event:
    try:
        event = json.loads(line)
        version = int(event["schema_version"])
        # As earlier versions named them.
        event |= {k: _renamed(event[k]) for k in ("event", "rule") if k in event}
        # A newer line may carry other things: its version comes first.
        if version <= SCHEMA_VERSION:
            for key in ("search_id", "time", *_REQUIRED.get(event["event"], ())):
                event[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise JournalError(
            f"{path} has a damaged line: {line[:60]!r}. Remove that line to use the rest."
        ) from None
    if version > SCHEMA_VERSION:
        raise JournalError(
            f"{path} was written by a newer visiontuner (schema {version}); update this one."
        )
    # Journals of before secrets were hidden in them; a line about an epoch holds no address.
    return _with_nonfinite(hide_secrets(event) if b"/" in line else event)


def _renamed(name: Any) -> Any:
    return name.replace("picture", "image") if isinstance(name, str) else name


# What the fold reads without asking; other events may come and are passed over.
_REQUIRED = {
    "trial_started": ("trial_id", "attempt", "configuration"),
    "epoch": ("trial_id", "attempt", "step", "metrics"),
    "finding": ("rule", "severity", "evidence", "advice"),
    "trial_ended": ("trial_id", "state"),
    "baseline_ended": ("name", "configuration", "metrics", "seconds"),
    "choice_made": ("chosen",),
    "network_left_out": ("backbone", "reason"),
    "network_stopped": ("backbone", "reason", "trials"),
}


# JSON has no NaN; a journal line stays readable by any JSON reader.
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _with_nonfinite(event: Event) -> Event:
    for key in ("metrics", "step_losses", "best_value"):
        if key in event:
            event[key] = _read_numbers(event[key])
    return event


def _read_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_numbers(item) for item in value]
    return _NONFINITE.get(value, math.nan) if isinstance(value, str) else value


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(
            f"{path} is being written by another process: this search is still running. "
            "Wait for it, or stop it before you resume."
        ) from None
    except OSError:
        pass  # some network file systems have no locks; one writer is then up to the caller


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _cut_torn_tail(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    end = size
    for start in _backwards(size):
        block = os.pread(descriptor, end - start, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            os.ftruncate(descriptor, start + newline + 1)
            return
        end = start
    os.ftruncate(descriptor, 0)


def _backwards(size: int, step: int = 65536) -> Iterator[int]:
    while size > 0:
        size = max(0, size - step)
        yield size
