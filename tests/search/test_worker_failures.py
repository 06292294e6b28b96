"""Which ends of a trial are a lost worker's."""

import pytest

from visiontuner.search.run import MOST_WORKER_FAILURES, WorkerFailures

UNAVAILABLE = (
    "Failure # 1 (occurred at 2026-11-22_22-54-35)\nThe actor f62d1b99 is unavailable: The actor "
    "is temporarily unavailable: RpcError: RPC error: Connection reset by peer rpc_code: 14."
)
DIED = (
    "Failure # 1 (occurred at 2026-11-22_22-54-35)\n"
    "The actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\n"
    "The actor died because its node has died. Node Id: 1"
)


@pytest.mark.parametrize("told", [UNAVAILABLE, DIED, DIED.split("\n", 1)[1]])
def test_a_trial_whose_worker_died_begins_again(told: str) -> None:
    failures = WorkerFailures()
    assert failures.begins_again("t0001", told)
    assert failures.take()
    assert not failures.take()


@pytest.mark.parametrize(
    "told",
    [
        "",
        "Failure # 1 (occurred at now)\nray::ImplicitFunc.train() (pid=1)\nTrialFailed: nan",
        "ray::ImplicitFunc.train()\nThe actor died unexpectedly before finishing this task.",
        "Failure # 1 (now)\nThe actor died because of an error raised in its creation task, x",
    ],
)
def test_what_a_trial_itself_raised_does_not(told: str) -> None:
    failures = WorkerFailures()
    assert not failures.begins_again("t0001", told)
    assert not failures.take()


@pytest.mark.parametrize(
    "error",
    [
        "OSError: [Errno 28] No space left on device: 'x'",
        "OSError: [Errno 122] Disk quota exceeded",
        "OSError: [Errno 5] Input/output error",
        "OSError: 4096 requested and 512 written",
        "SafetensorError: Error while serializing: I/O error: Os { code: 28, kind: StorageFull, "
        'message: "No space left on device" }',
        "visiontuner.errors.TrialFailed: Cannot write the checkpoint c: Disk quota exceeded; make",
        "sqlite3.OperationalError: database or disk is full",
        "sqlite3.OperationalError: disk I/O error",
    ],
)
def test_a_disk_that_fails_a_trial_ends_the_search(error: str) -> None:
    ended: list[str] = []
    failures = WorkerFailures(end_search=lambda: ended.append("search"))
    told = f"Failure # 1 (now)\nray::ImplicitFunc.train() (pid=1)\n{error}\n"
    assert failures.is_of_disk(told, error)
    assert (failures.disk_error, ended) == (error, ["search"])


def test_other_failures_are_the_trials_own() -> None:
    failures = WorkerFailures(end_search=pytest.fail)
    assert not failures.is_of_disk("TrialFailed: The training loss is nan", "nan")
    assert not failures.is_of_disk("FileNotFoundError: [Errno 2] No such file", "gone")
    assert failures.disk_error is None


def test_a_trial_that_ends_every_worker_fails_at_last() -> None:
    failures = WorkerFailures()
    again = [failures.begins_again("t0001", DIED) for _ in range(MOST_WORKER_FAILURES)]
    assert again == [True] * (MOST_WORKER_FAILURES - 1) + [False]
    assert failures.begins_again("t0002", DIED)
