"""Workarounds on private names of others: without such a name a later version takes longer."""

import gc
import sys
import threading

import pytest
import torch

from visiontuner.workarounds import mlflow as mlflow_workarounds
from visiontuner.workarounds import ray as ray_workarounds
from visiontuner.workarounds import torch as torch_workarounds
from visiontuner.workarounds.python import clean_workers, left_alone
from visiontuner.workarounds.sklearn import without_package


def test_ray_without_the_private_names_is_left_as_it_is(monkeypatch):
    from ray._private.node import Node
    from ray.tune.execution import class_cache

    for name in ("start_monitor", "start_log_monitor", "start_api_server"):
        monkeypatch.delattr(Node, name)
    for name in ("DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE"):
        monkeypatch.delattr(class_cache, name)
    before = dict(vars(Node)), dict(vars(class_cache))
    with ray_workarounds.without_monitors(), ray_workarounds.no_runtime_environments():
        assert (dict(vars(Node)), dict(vars(class_cache))) == before


def test_ray_has_its_own_names_back_afterwards():
    from ray._private.node import Node
    from ray.tune.execution import class_cache

    before = dict(vars(Node)), dict(vars(class_cache))
    with ray_workarounds.without_monitors(), ray_workarounds.no_runtime_environments():
        assert dict(vars(Node)) != before[0]
        assert not class_cache.ENV_VARS_TO_PROPAGATE
    assert (dict(vars(Node)), dict(vars(class_cache))) == before


def test_a_wait_for_ray_ends_with_the_port_its_time_or_who_gives_it_up(monkeypatch):
    from ray._private import node

    answers = iter([RuntimeError("not there"), 6379])

    def look(*_: object, timeout_ms: int) -> int:
        assert timeout_ms == 0  # or it would hold the interpreter's lock
        answer = next(answers, RuntimeError("not there"))
        if isinstance(answer, int):
            return answer
        raise answer

    monkeypatch.setattr(node, "wait_for_persisted_port", look)
    given_up = threading.Event()
    with ray_workarounds.waits_until(given_up):
        assert node.wait_for_persisted_port("folder", "node", "port", timeout_ms=60_000) == 6379
        with pytest.raises(RuntimeError, match="not there"):
            node.wait_for_persisted_port("folder", "node", "port", timeout_ms=0)
        given_up.set()
        with pytest.raises(RuntimeError, match="not there"):
            node.wait_for_persisted_port("folder", "node", "port", timeout_ms=3_600_000)
    assert node.wait_for_persisted_port is look
    monkeypatch.delattr(node, "wait_for_persisted_port")
    with ray_workarounds.waits_until(given_up):
        assert not hasattr(node, "wait_for_persisted_port")


def test_mlflow_without_the_private_name_looks_itself(monkeypatch):
    from mlflow.utils import requirements_utils

    monkeypatch.delattr(requirements_utils, "_check_requirement_satisfied")
    with mlflow_workarounds.requirements_taken_on_trust():
        assert not hasattr(requirements_utils, "_check_requirement_satisfied")


def test_norms_are_those_of_each_tensor():
    tensors = [torch.tensor([3.0, 4.0]), torch.ones(2, 2)]
    assert [float(norm) for norm in torch_workarounds.tensor_norms(tensors)] == pytest.approx(
        [5, 2]
    )
    assert torch_workarounds.tensor_norms([]) == []


def test_a_package_is_only_absent_within():
    with without_package("no_such_package_here"):
        assert sys.modules["no_such_package_here"] is None
    assert "no_such_package_here" not in sys.modules
    with without_package("torch"):  # it is imported already
        assert sys.modules["torch"] is torch


def test_the_script_and_the_collector_are_as_before():
    main = sys.modules["__main__"]
    before = dict(vars(main))
    with clean_workers():
        assert main.__spec__ is None
    assert dict(vars(main)) == before
    with left_alone():
        assert not gc.isenabled()
    assert gc.isenabled()
