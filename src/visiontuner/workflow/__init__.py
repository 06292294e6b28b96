"""Joins the parts; what the command line and the notebook call.

prepare(experiment)            look at the pictures
run_search(experiment)         search, track, package and register
resume_search(folder)          the same, from where a search was stopped
sync_search(folder)            write a search's journal into MLflow, late or elsewhere
"""

from visiontuner.workflow.layout import SearchResult
from visiontuner.workflow.observing import Observer, Silent
from visiontuner.workflow.pictures import Prepared, prepare
from visiontuner.workflow.search import resume_search, run_search
from visiontuner.workflow.sync import sync_search

__all__ = [
    "Observer",
    "Prepared",
    "SearchResult",
    "Silent",
    "prepare",
    "resume_search",
    "run_search",
    "sync_search",
]
