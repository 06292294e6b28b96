"""The numbers behind a search's figures, as files: what a chart shows, others can compute with."""

from __future__ import annotations

import json

from visiontuner.journal import SearchRecord
from visiontuner.text import csv_row
from visiontuner.tracking.importance import importances


def search_numbers(record: SearchRecord) -> dict[str, str]:
    """File name -> text.

    Returns:
        `importance.json`: fractions that sum to 1 by searched value, if there is that figure;
        `learning_rate_batch_size.csv`: a row for each usable trial, best first, if both were
        searched.
    """
    files = {}
    shares, ranking = importances(record), record.ranking()
    if shares:
        content = {
            "objective": record.objective,
            "method": "PED-ANOVA over the best quarter",
            "trials": len(ranking),
            "importance": shares,
        }
        files["importance.json"] = json.dumps(content, indent=1) + "\n"
    names = ["learning_rate", "batch_size"]
    rows = [
        [t.trial_id, *(t.configuration[name] for name in names), t.best_value]
        for t in ranking
        if t.configuration.keys() >= set(names)
    ]
    if rows:
        table = [["trial_id", *names, record.objective], *rows]
        files["learning_rate_batch_size.csv"] = "".join(map(csv_row, table))
    return files
