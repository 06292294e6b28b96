"""What a person sees while one training runs: a bar in the epoch, and a line for each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from visiontuner.console import SearchConsole
from visiontuner.journal import Event, SearchRecord, TrialRecord, best_epoch

# Reading the loss makes a GPU wait, so it is read as often as a person can look.
_SECONDS_BETWEEN_LOOKS = 0.25
# In a file or in CI: long epochs say now and then that they live.
_SECONDS_BETWEEN_LINES = 30.0


class TrainingConsole(SearchConsole):
    """A `TrainingObserver` of `workflow.train`; elsewhere than in a terminal there is no bar."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._training = SearchRecord()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._looked = time.monotonic()

    def trials_begin(self, record: SearchRecord, total: int) -> None:
        """From now on `event` brings epochs."""
        self._end_bar()
        self._training = record
        self._looked = time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps"),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("Epoch 1", total=None, loss="–")
            self._progress.start()

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
        """After each optimizer step."""
        now = time.monotonic()
        wait = _SECONDS_BETWEEN_LOOKS if self._progress else _SECONDS_BETWEEN_LINES
        if now - self._looked < wait and (step < steps or self._progress is None):
            return
        self._looked = now
        name = f"Epoch {epoch}/{self._epochs()}"
        if self._progress is None:
            self.console.print(f"{name}: {step}/{steps} steps, loss {loss():.4g}")
        else:
            self._progress.update(
                self._task, description=name, completed=step, total=steps, loss=f"{loss():.4g}"
            )

    def event(self, event: Event) -> None:
        """One journal line, already folded into the record."""
        if event["event"] == "epoch":
            self._looked = time.monotonic()
            trial = self._training.trials[event["trial_id"]]
            self.console.print(self._epoch_line(trial))

    def trials_end(self) -> None:
        """The bar goes."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _epochs(self) -> int:
        trials = list(self._training.trials.values())
        return self._training.epochs_of(trials[0]) if trials else 0

    def _epoch_line(self, trial: TrialRecord) -> str:
        newest, objective = trial.epochs[-1], self._training.objective
        wanted = ["train_loss", "validation_loss", objective]
        if self._training.is_unvalidated:
            wanted = ["train_loss", "train_accuracy"]
        words = [f"epoch {newest.step}/{self._epochs()}"]
        words += [f"{name} {newest.metrics[name]:.4f}" for name in dict.fromkeys(wanted)]
        best = best_epoch(trial.epochs, objective, self._training.mode)
        if best is not None:
            before = f"best {best.metrics[objective]:.4f} in epoch {best.step}"
            words.append("the best so far" if best is newest else before)
        words.append(f"{newest.metrics['images_per_second']:,.0f} pictures/s")
        return "  ".join(words)
