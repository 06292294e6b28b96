"""What was recorded of a training comes back from its file as it was."""

from __future__ import annotations

import numpy as np
import pytest

from visiontuner.diagnostics.history import (
    Recording,
    StepRecord,
    SystemRecord,
    TensorRecord,
    find_recording,
)


def recording() -> Recording:
    rng = np.random.default_rng(0)
    return Recording(
        tensors=TensorRecord(
            steps=np.array([1, 50]),
            layers=("conv", "relu"),
            kinds=("Conv2d", "ReLU"),
            values={"weight_norm": np.array([[1, np.nan], [2, np.nan]], np.float32)},
            input_mean=np.zeros((2, 3), np.float32),
            input_std=np.ones((2, 3), np.float32),
            input_min=np.full(2, -1, np.float32),
            input_max=np.full(2, 1, np.float32),
            inputs=rng.normal(size=(1, 3, 4, 4)).astype(np.float16),
            notes=("fc: never ran",),
        ),
        steps=StepRecord(
            steps=np.array([1, 2, 3]),
            seconds=rng.random((3, 6)).astype(np.float32),
            images=np.array([8, 8, 4]),
            startup_seconds=1.5,
            device="cpu",
            workers=2,
        ),
        system=SystemRecord(
            times=np.array([1e9, 1e9 + 1]),
            values={"cpu_utilization_percentage": np.array([50, 60], np.float32)},
        ),
        about={"every_steps": 50},
    )


def test_a_recording_comes_back_as_it_was_saved(tmp_path):
    made = recording()
    made.save(tmp_path / "recording.npz")
    back = Recording.load(tmp_path / "recording.npz")
    assert back.about == made.about
    for name in ("tensors", "steps", "system"):
        before, after = vars(getattr(made, name)), vars(getattr(back, name))
        assert before.keys() == after.keys()
        for key, value in before.items():
            np.testing.assert_equal(after[key], value)
    assert [path.name for path in tmp_path.iterdir()] == ["recording.npz"]


def test_a_statistic_that_was_not_recorded_is_nan_everywhere():
    tensors = recording().tensors
    assert tensors is not None
    assert tensors.of("activation_zeros").shape == (2, 2)
    assert np.isnan(tensors.of("activation_zeros")).all()


def test_what_was_not_recorded_is_none(tmp_path):
    Recording(about={"a": 1}).save(tmp_path / "r.npz")
    assert Recording.load(tmp_path / "r.npz") == Recording(about={"a": 1})


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"words"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.npz is no recording"):
        Recording.load(tmp_path / "r.npz")


def test_a_damaged_file_is_refused_whatever_is_damaged(tmp_path):
    path = tmp_path / "recording.npz"
    recording().save(path)
    whole, refused = path.read_bytes(), 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(len(whole), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            Recording.load(path)
        except (OSError, ValueError):
            refused += 1
            assert find_recording(tmp_path) is None
    assert refused > 200
