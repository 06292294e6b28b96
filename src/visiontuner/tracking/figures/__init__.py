"""Numbers -> matplotlib figures. No files, no pyplot, no global state.

Every function takes numbers and returns a new Figure. Colours are safe for colour-blind eyes.
"""

from visiontuner.tracking.figures.compare import (
    MOST_CURVES,
    Curve,
    learning_curves,
    searches_side_by_side,
)
from visiontuner.tracking.figures.contact_sheet import contact_sheet
from visiontuner.tracking.figures.evaluation import evaluation_figures
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.recording import recording_figures
from visiontuner.tracking.figures.search import (
    all_curves,
    best_so_far,
    importance,
    learning_rate_batch_size_map,
    parallel_coordinates,
    search_figures,
)
from visiontuner.tracking.figures.trial import trial_curves

__all__ = [
    "MOST_CURVES",
    "Curve",
    "all_curves",
    "best_so_far",
    "contact_sheet",
    "evaluation_figures",
    "importance",
    "learning_curves",
    "learning_rate_batch_size_map",
    "parallel_coordinates",
    "recording_figures",
    "search_figures",
    "searches_side_by_side",
    "to_png",
    "trial_curves",
]
