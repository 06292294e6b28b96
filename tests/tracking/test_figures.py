import io
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from PIL import Image

from visiontuner.journal import SearchRecord
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.searches import (
    Curve,
    best_so_far,
    importances,
    learning_curves,
    learning_rate_batch_size_map,
    parallel_coordinates,
    search_figures,
    trial_curves,
)

NewSearch = Callable[..., Any]


def record_of(search: Any) -> SearchRecord:
    return SearchRecord.load(search.folder)


def drawn(figure: Figure) -> Image.Image:
    image = Image.open(io.BytesIO(to_png(figure))).convert("L")
    low, high = image.getextrema()
    assert (low, high)[0] < 128 < high, "the figure is blank"
    return image


@pytest.mark.parametrize("trials", [1, 2, 12, 150])
def test_every_figure_can_be_drawn_for_any_number_of_trials(
    new_search: NewSearch, trials: int
) -> None:
    search = new_search()
    search.begin()
    for number in range(1, trials + 1):
        search.trial(number, epochs=2)
    found = search_figures(record_of(search))
    expected = {"all_curves", "best_so_far", "learning_rate_batch_size", "parallel_coordinates"}
    assert set(found) == (expected | {"importance"} if trials >= 8 else expected)
    for figure in found.values():
        drawn(figure)


def test_axes_zoom_to_where_the_good_trials_are_and_say_what_lies_outside(
    new_search: NewSearch,
) -> None:
    search = new_search()
    search.begin()
    values = [0.05, 0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.10]
    for number, value in enumerate(values, 1):
        search.trial(number, epochs=2, best_value=value)
    figure = best_so_far(record_of(search))
    low, high = figure.axes[0].get_ylim()
    assert 0.84 < low < 0.86  # the best half is 0.92 to 0.95: twice as much below it
    assert 0.95 < high < 0.96
    assert figure.texts[0].get_text().endswith("2 trials below")
    drawn(figure)


def test_the_outcome_of_parallel_coordinates_zooms_as_well(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    values = [0.05, 0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.10]
    for number, value in enumerate(values, 1):
        search.trial(number, epochs=2, best_value=value)
    figure = parallel_coordinates(record_of(search))
    assert figure is not None
    # The best half is 0.92 to 0.95, and the scale from 0.86 to the best; below are two trials.
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said[-5:] == ["≤ 0.86", "0.88", "0.91", "0.93", "0.95"]
    (lines,) = figure.axes[0].collections
    ends = sorted(float(path.vertices[-1, 1]) for path in lines.get_paths())
    assert ends[:2] == [0.0, 0.0]
    assert ends[2] == pytest.approx(0.04 / 0.09)  # 0.90
    drawn(figure)


def test_a_diverged_run_does_not_flatten_the_others() -> None:
    finals = [0.5, 0.4, 0.6, 50.0]
    curves = [Curve(f"run {n}", [1, 2], [final + 0.1, final]) for n, final in enumerate(finals)]
    figure = learning_curves({"validation_loss": curves})
    # The better half ends at 0.4 and 0.5: 0.4 to 0.6, and twice that span above.
    assert figure.axes[0].get_ylim()[1] < 1.1
    assert figure.axes[0].get_ylabel() == "Validation loss, of the best half"
    few = learning_curves({"validation_loss": curves[1:]})
    assert few.axes[0].get_ylim()[1] > 50


def test_names_in_a_legend_are_cut_in_the_middle_and_never_alike() -> None:
    names = ["a" * 40 + middle + "b" * 40 for middle in ("x", "y")]
    figure = learning_curves({"validation_loss": [Curve(n, [1, 2], [1.0, 2.0]) for n in names]})
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(said)) == 2
    assert all(text.startswith("aaaa") and "…b" in text for text in said)


def test_values_near_each_other_are_all_shown(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number, value in enumerate([0.90, 0.92, 0.93, 0.95], 1):
        search.trial(number, epochs=2, best_value=value)
    figure = best_so_far(record_of(search))
    assert figure.axes[0].get_ylim()[0] < 0.9
    assert "below" not in figure.texts[0].get_text()


def test_a_search_without_a_usable_trial_draws_what_it_has(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1, state="failed", best_value=None, best_epoch=None, error="loss is NaN")
    record = record_of(search)
    assert set(search_figures(record)) == {"all_curves", "best_so_far"}
    for figure in search_figures(record).values():
        drawn(figure)
    assert learning_rate_batch_size_map(record) is None
    assert parallel_coordinates(record) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_values_that_are_no_numbers_leave_gaps_in_a_curve(
    new_search: NewSearch, value: float
) -> None:
    search = new_search()
    search.begin()
    search.start(1)
    for step in (1, 2, 3):
        search.epoch(1, step, validation_loss=value if step == 2 else 1.0)
    search.end(1)
    figure = trial_curves(record_of(search).trials["t0001"])
    drawn(figure)
    validation = figure.axes[0].get_lines()[1]
    assert list(validation.get_xdata()) == [1, 3]


def test_a_trials_kept_epoch_is_marked(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1, epochs=3, best_epoch=2)
    figure = trial_curves(record_of(search).trials["t0001"])
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "Training",
        "Validation",
        "Kept: 2",
    ]


def test_a_trial_drawn_into_anothers_figure_is_the_same_image(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1, epochs=3)
    search.trial(2, epochs=40, best_epoch=31)
    search.trial(3, epochs=1, state="failed")
    trials = list(record_of(search).trials.values())
    figure = None
    for trial in [*trials, *reversed(trials)]:
        figure = trial_curves(trial, into=figure)
        assert to_png(figure) == to_png(trial_curves(trial))


def test_the_map_needs_both_values(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.append(
        "trial_started", trial_id="t0001", attempt=1, configuration={"learning_rate": 0.01}
    )
    search.end(1)
    record = record_of(search)
    assert learning_rate_batch_size_map(record) is None
    assert parallel_coordinates(record) is not None


def test_choices_and_numbers_share_the_parallel_coordinates(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number, optimizer in enumerate(["adamw", "sgd", "adamw"], 1):
        search.append(
            "trial_started",
            trial_id=f"t{number:04d}",
            attempt=1,
            configuration={"optimizer": optimizer, "weight_decay": 0.01 * number, "dropout": 0.0},
        )
        search.end(number)
    figure = parallel_coordinates(record_of(search))
    assert figure is not None
    drawn(figure)


def test_best_so_far_never_gets_worse(new_search: NewSearch) -> None:
    search = new_search(objective="validation_loss")
    search.begin()
    for number, value in enumerate([0.5, 0.9, 0.4], 1):
        search.trial(number, best_value=value)
    figure = best_so_far(record_of(search))
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_ydata()) == [0.5, 0.5, 0.4]


def test_importance_finds_the_value_that_decides(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number in range(1, 25):
        search.append(
            "trial_started",
            trial_id=f"t{number:04d}",
            attempt=1,
            configuration={
                "learning_rate": 10 ** -(1 + (number % 6) / 2),
                "batch_size": [32, 64, 128][number % 3 if number < 13 else (number + 1) % 3],
            },
        )
        search.end(number, best_value=0.4 + 0.1 * (number % 6))
    shares = importances(record_of(search))
    assert shares["learning_rate"] > 0.7
    assert math.isclose(sum(shares.values()), 1.0)


def test_importance_does_without_scikit_learn_and_leaves_it_to_others(
    new_search: NewSearch,
) -> None:
    search = new_search()
    search.begin()
    for number in range(1, 25):
        search.trial(number, epochs=1)
    script = """
        import sys
        from pathlib import Path
        from visiontuner.journal import SearchRecord
        from visiontuner.tracking.figures.searches import importances

        assert importances(SearchRecord.load(Path(sys.argv[1])))
        assert "sklearn" not in sys.modules
        import sklearn.ensemble
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(search.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_drawing_leaves_no_global_state(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    before = dict(mpl.rcParams)
    search_figures(record_of(search))
    assert dict(mpl.rcParams) == before
