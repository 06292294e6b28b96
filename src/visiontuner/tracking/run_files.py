"""What a run gets besides numbers: figures, the numbers behind them, recordings, the search's page.

matplotlib is imported with the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.tracking.numbers import search_numbers
from visiontuner.tracking.plan import SearchPlan, TrialPlan
from visiontuner.tracking.recordings import files_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from visiontuner.training.recording.records import Recording


class RunFiles:
    """The files of one search's runs, content by path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._curves: Figure | None = None  # the last trial's, to draw the next one's into

    def of_trial(
        self, plan: SearchPlan, trial: TrialPlan, recording: Recording | None
    ) -> dict[str, bytes]:
        """A trial's curves, and the figures of what was recorded of it."""
        from visiontuner.tracking import figures

        record, files = plan.record.trials[trial.trial_id], dict[str, bytes]()
        if record.epochs and trial.has_curves:
            into, self._curves = self._curves, None
            curves = figures.trial_curves(record, plan.record.objective, into=into)
            files["figures/curves.png"] = figures.to_png(curves)
            self._curves = curves
        if recording is not None:
            files |= files_of(self._folder / "trials" / trial.trial_id, recording)
        return files

    def of_search(self, plan: SearchPlan, places: Mapping[str, Any]) -> dict[str, bytes]:
        """The search's figures, the numbers behind them, and the page that shows it all.

        Args:
            places: where its runs are.
        """
        from visiontuner.tracking import figures
        from visiontuner.tracking.html import write_page

        drawn = {n: figures.to_png(f) for n, f in figures.search_figures(plan.record).items()}
        page = write_page(self._folder, figures=drawn, state=plan.state, where=places)
        numbers = search_numbers(plan.record)
        return {
            **{f"figures/{name}.png": png for name, png in drawn.items()},
            **{f"figures/{name}": text.encode() for name, text in numbers.items()},
            page.name: page.read_bytes(),
        }
