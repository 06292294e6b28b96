import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from visiontuner.journal import SearchRecord
from visiontuner.tracking.figures.searches import search_numbers

NewSearch = Callable[..., Any]


def numbers_of(search: Any) -> dict[str, str]:
    return search_numbers(SearchRecord.load(search.folder))


def test_the_map_has_a_row_for_each_usable_trial_best_first(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number in (1, 2, 3):
        search.trial(number)
    search.trial(4, state="failed", best_value=None)
    (name,) = files = numbers_of(search)
    rows = list(csv.reader(io.StringIO(files[name])))
    assert name == "learning_rate_batch_size.csv"
    assert rows[0] == ["trial_id", "learning_rate", "batch_size", "validation_accuracy"]
    assert [row[0] for row in rows[1:]] == ["t0003", "t0002", "t0001"]
    assert [float(value) for value in rows[3][1:]] == [0.001 * 1.001, 64, 0.53]


def test_importance_is_a_file_where_it_is_a_figure(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number in range(1, 8):
        search.trial(number, best_value=number / 10)
    assert "importance.json" not in numbers_of(search)
    search.trial(8)
    content = json.loads(numbers_of(search)["importance.json"])
    assert (content["objective"], content["trials"]) == ("validation_accuracy", 8)
    assert set(content["importance"]) == {"learning_rate", "batch_size"}
    assert math.isclose(sum(content["importance"].values()), 1)


def test_without_trials_there_are_no_numbers(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    assert numbers_of(search) == {}
