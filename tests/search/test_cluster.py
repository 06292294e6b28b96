"""What a trial gets of the machines."""

import pytest

from visiontuner.errors import ExperimentError
from visiontuner.experiment import Search
from visiontuner.search.cluster import share_out

LAPTOP = {"CPU": 4.0}
GPU_MACHINE = {"CPU": 16.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("machines", "settings", "trials", "threads"),
    [
        ([LAPTOP], {}, 4, 1),
        ([LAPTOP], {"cpus_per_trial": 2}, 2, 2),
        ([LAPTOP], {"cpus_per_trial": 0.5}, 8, 1),
        ([LAPTOP, {"CPU": 2.0}], {}, 6, 1),
        # Four trials share the GPU, and with it all cores.
        ([GPU_MACHINE], {}, 4, 4),
        ([GPU_MACHINE], {"gpus_per_trial": 1}, 1, 16),
        ([GPU_MACHINE], {"gpus_per_trial": 1, "cpus_per_trial": 2}, 1, 16),
        ([{"CPU": 8.0, "GPU": 8.0}], {"gpus_per_trial": 1}, 8, 1),
        # A machine without a GPU runs no trial then, and the weakest of the others decides.
        ([GPU_MACHINE, LAPTOP], {}, 4, 4),
        ([GPU_MACHINE, {"CPU": 8.0, "GPU": 1.0}], {}, 8, 2),
    ],
)
def test_trials_share_cores_and_gpus(machines, settings, trials, threads):
    resources = share_out(machines, Search(**settings))
    assert resources.concurrent_trials == trials
    assert resources.threads == threads
    assert resources.to_ray()["cpu"] == settings.get("cpus_per_trial", 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cpus_per_trial": 17}, "cpus_per_trial is 17, but the machine has 16"),
        ({"gpus_per_trial": 2}, "gpus_per_trial is 2, but the machine has 1"),
    ],
)
def test_more_than_the_largest_machine_has_is_refused(settings, told):
    with pytest.raises(ExperimentError, match=told):
        share_out([GPU_MACHINE, LAPTOP], Search(**settings))
