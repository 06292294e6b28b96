"""Samples of this very machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from visiontuner.diagnostics import recorder as recording
from visiontuner.diagnostics.recorder import Recorder
from visiontuner.diagnostics.system import Gpu, SystemSampler

CPU = torch.device("cpu")


def sampled(folder: Path, count: int, **options) -> SystemSampler:
    """A sampler that has taken so many, and has ended."""
    sampler = SystemSampler(folder, CPU, **{"interval_seconds": 0.01, **options})
    while len(sampler.record().times) < count:
        time.sleep(0.01)
    sampler.close()
    return sampler


def test_it_samples_what_mlflow_samples(tmp_path):
    record = sampled(tmp_path, 3).record()
    assert set(record.values) == {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "disk_usage_percentage",
        "disk_usage_megabytes",
        "disk_available_megabytes",
        "process_memory_megabytes",
    }
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

    for monitor in (CPUMonitor(), DiskMonitor()):
        monitor.collect_metrics()
        for name, (theirs,) in monitor.metrics.items():
            assert name in record.values
            if "cpu" not in name and "available" not in name:
                assert np.nanmedian(record.of(name)) == pytest.approx(theirs, rel=0.2)
    assert (np.diff(record.times) > 0).all()
    assert record.times[-1] == pytest.approx(time.time(), abs=60)


def test_memory_is_that_of_the_training_and_of_the_processes_it_started(tmp_path):
    alone = sampled(tmp_path, 2).record().of("process_memory_megabytes")[-1]
    child = subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(200_000_000); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        child.stdout.readline()
        together = sampled(tmp_path, 2).record().of("process_memory_megabytes")[-1]
    finally:
        child.communicate(b"\n")
    assert together > alone + 150
    # Or more: other tests may have left processes of their own.
    own = psutil.Process().memory_info()
    assert alone > 0.7 * (own.rss - own.shared) / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell them apart")
def test_pages_of_a_mapped_file_are_not_the_trainings_memory(tmp_path):
    """Every worker maps the decoded images, and reads ever more of them."""
    path = tmp_path / "pixels"
    path.write_bytes(bytes(200_000_000))
    mapped = np.memmap(path, np.uint8, "r")
    before = sampled(tmp_path, 2).record().of("process_memory_megabytes")[-1]
    resident = psutil.Process().memory_info().rss
    assert int(mapped[::4096].sum()) == 0
    after = sampled(tmp_path, 2).record().of("process_memory_megabytes")[-1]
    assert psutil.Process().memory_info().rss > resident + 150_000_000
    assert after < before + 50


def test_a_long_training_is_sampled_less_often(tmp_path):
    sampler = sampled(tmp_path, 7, most_samples=8)
    again = SystemSampler(tmp_path, CPU, interval_seconds=0.001, most_samples=8)
    while again._interval < 0.008:
        time.sleep(0.01)
    again.close()
    record = again.record()
    assert len(record.times) <= 8
    assert (np.diff(record.times) > 0).all()
    assert len(sampler.record().times) <= 8


def test_going_on_keeps_what_was_sampled_before(tmp_path):
    first = sampled(tmp_path, 3).record()
    again = SystemSampler(tmp_path, CPU, interval_seconds=0.01)
    again.go_on(first)
    again.close()
    record = again.record()
    assert record.times[: len(first.times)].tolist() == first.times.tolist()
    assert len(record.times) > len(first.times)


class SliceOfAGpu:
    """Stands in for NVML: a slice of a GPU tells its memory and no use."""

    class NVMLError(Exception): ...

    def __getattr__(self, name):
        def refuse(*_):
            raise self.NVMLError(f"{name}: Not Supported")

        return refuse

    def nvmlDeviceGetIndex(self, handle):  # noqa: N802
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=1e9, total=4e9)


def test_what_nvml_does_not_tell_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Gpu, "of", lambda *_: Gpu(SliceOfAGpu(), "handle"))
    sampler = SystemSampler(tmp_path, torch.device("cuda"), interval_seconds=0.01)
    sampler.close()
    assert sampler.problem == "use of the GPU, which NVML does not tell"
    assert sampler.record().of("gpu_0_memory_usage_percentage").tolist()[0] == 25.0


def test_a_gpu_that_nvml_cannot_find_is_said(tmp_path, monkeypatch):
    def missing(*_):
        raise SliceOfAGpu.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(Gpu, "of", missing)
    on_gpu = partial(SystemSampler, device=torch.device("cuda"))
    monkeypatch.setattr(recording, "SystemSampler", lambda folder, _: on_gpu(folder))
    with closing(Recorder(tmp_path, nn.Linear(2, 2), every_steps=1, began=0.0)) as recorder:
        about = recorder.recording().about
    assert about["problem"] == "use of the GPU, NVMLError: Driver Not Loaded"
    assert sampled(tmp_path, 1).problem is None  # on a CPU there is nothing to miss


def test_the_thread_ends_with_the_training(tmp_path):
    sampled(tmp_path, 1)
    assert "system-sampler" not in {thread.name for thread in threading.enumerate()}


def test_a_folder_that_is_gone_costs_no_more_than_its_numbers(tmp_path):
    sampler = sampled(tmp_path / "gone", 2)
    assert len(sampler.record().times) >= 2
