"""Joins the parts; what the command line and the notebook call.

prepare(experiment)            look at the pictures
run_search(experiment)         search, track, package and register
resume_search(folder)          the same, from where a search was stopped
train(experiment)              one training; `find_origin`, `one_training`: with a search's best
resume_training(folder)        the same, from where a training was stopped
sync_search(folder)            write a search's journal into MLflow, late or elsewhere
evaluate_search(folder)        choose, calibrate, look at the test pictures once
compare(targets)               runs and searches as a pandas table
diagnose(target)               what went wrong, and what to change
promote(model)                 make the newest version the champion, if it is better
trace(subject)                 where a model comes from
plan_deployment(model, …)      find and check what an endpoint needs; deploy(…) makes it
undeploy(name), endpoints()    take an endpoint away; list ours
plan_job(experiment, …)        find and check what a training job needs; submit_job(…) makes it
attach(job)                    follow a training job, bring its search home; jobs(), stop(job)
"""

from visiontuner.workflow.attach import Attached, attach
from visiontuner.workflow.compare import compare
from visiontuner.workflow.deploy import (
    DeployOptions,
    deploy,
    endpoints,
    plan_deployment,
    undeploy,
)
from visiontuner.workflow.diagnose import diagnose
from visiontuner.workflow.evaluate import EvaluationResult, evaluate_search
from visiontuner.workflow.job_options import JobOptions
from visiontuner.workflow.jobs import jobs, stop
from visiontuner.workflow.layout import SearchResult
from visiontuner.workflow.lineage import trace
from visiontuner.workflow.observing import Observer, Silent
from visiontuner.workflow.pictures import Prepared, prepare
from visiontuner.workflow.promote import promote
from visiontuner.workflow.search import resume_search, run_search
from visiontuner.workflow.submit import plan_job, submit_job
from visiontuner.workflow.sync import sync_search
from visiontuner.workflow.train import resume_training, train
from visiontuner.workflow.train_from import find_origin, one_training

__all__ = [
    "Attached",
    "DeployOptions",
    "EvaluationResult",
    "JobOptions",
    "Observer",
    "Prepared",
    "SearchResult",
    "Silent",
    "attach",
    "compare",
    "deploy",
    "diagnose",
    "endpoints",
    "evaluate_search",
    "find_origin",
    "jobs",
    "one_training",
    "plan_deployment",
    "plan_job",
    "prepare",
    "promote",
    "resume_search",
    "resume_training",
    "run_search",
    "stop",
    "submit_job",
    "sync_search",
    "trace",
    "train",
    "undeploy",
]
