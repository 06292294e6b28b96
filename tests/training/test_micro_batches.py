import weakref

import pytest
import torch
from torch import nn

from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import MicroBatches, is_out_of_memory
from visiontuner.training.loop import TrainingStep
from visiontuner.training.optimisation import make_optimizer, make_schedule

HUGE = 1 << 50  # bytes; more than any machine's address space grants


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (64, None, [64]),
        (64, 64, [64]),
        (64, 100, [64]),
        (64, 16, [16, 16, 16, 16]),
        (65, 32, [22, 22, 21]),  # never 32, 32, 1
        (5, 4, [3, 2]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_pieces_are_as_few_as_fit_and_even(count, size, sizes):
    assert MicroBatches(size, where="training").sizes(count) == sizes


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (3, 2, [3]),
        (5, 2, [3, 2]),
        (7, 2, [3, 2, 2]),
        (6, 2, [2, 2, 2]),
        (5, 4, [3, 2]),
        (1, 2, [1]),
        (3, 1, [1, 1, 1]),  # asked for, or all that memory holds
    ],
)
def test_no_sample_is_left_alone_where_two_are_the_fewest(count, size, sizes):
    assert MicroBatches(size, where="training", fewest=2).sizes(count) == sizes


def normalised(*, learns: bool) -> nn.Module:
    """Batch normalisation of vectors, which fails on one of them."""
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm if learns else nn.Identity(), nn.Linear(4, 2))


@pytest.mark.parametrize(("learns", "seen"), [(True, [3]), (False, [2, 1])])
def test_a_step_leaves_batch_normalisation_no_single_sample(learns, seen):
    settings, network = Training(micro_batch_size=2), normalised(learns=learns)
    optimizer = make_optimizer(network, settings)
    schedule = make_schedule(optimizer, settings, total_steps=1)
    pieces = []
    network.register_forward_pre_hook(lambda _, inputs: pieces.append(len(inputs[0])))
    TrainingStep(network, optimizer, schedule, settings)(torch.randn(3, 4), torch.tensor([0, 1, 0]))
    assert pieces == seen


@pytest.mark.parametrize(
    ("before", "limit", "after"),
    [(None, None, None), (None, 8, 8), (16, 8, 8), (4, 8, 4), (4, None, 4)],
)
def test_a_limit_never_lets_more_through(before, limit, after):
    pieces = MicroBatches(before, where="training")
    pieces.limit(limit)
    assert pieces.size == after


def test_a_real_allocation_that_fails_halves_until_it_fits():
    tried = []

    def attempt(sizes):
        tried.append(sizes)
        if max(sizes) > 12:
            torch.empty(HUGE, dtype=torch.uint8)
        return sum(sizes)

    pieces = MicroBatches(None, where="training")
    assert pieces.run(50, attempt) == 50
    assert tried == [[50], [25, 25], [10] * 5]  # at most 25, then at most 12
    assert pieces.take_notes() == [
        "out of memory in training at 50 images, going on with 25 at a time",
        "out of memory in training at 25 images, going on with 12 at a time",
    ]
    assert pieces.take_notes() == []
    assert pieces.run(24, attempt) == 24  # it remembers
    assert tried[3:] == [[12, 12]]


def test_what_an_attempt_held_is_free_before_the_next_one():
    alive = []

    def attempt(_sizes):
        block = torch.zeros(1000)
        alive.append(weakref.ref(block))
        assert all(ref() is None for ref in alive[:-1])
        if len(alive) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return len(block)

    assert MicroBatches(None, where="training").run(8, attempt) == 1000


def test_one_image_that_does_not_fit_fails_the_trial_with_advice():
    def attempt(_sizes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrialFailed, match=r"evaluation with one image .* model\.image_size"):
        MicroBatches(None, where="evaluation").run(7, attempt)


def test_another_error_is_passed_on_at_once():
    calls = []

    def attempt(sizes):
        calls.append(sizes)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        MicroBatches(None, where="training").run(8, attempt)
    assert len(calls) == 1


def test_only_memory_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(HUGE, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was found"))
    assert not is_out_of_memory(RuntimeError("element 0 of tensors does not require grad"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
