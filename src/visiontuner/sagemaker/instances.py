"""What SageMaker's kinds of machines differ in."""

from __future__ import annotations

# As the SageMaker SDK's `volume_size_supported` has them, and all of p6 (EC2's list of instance
# store volumes). An unknown family counts as one without: SageMaker says then what it refuses.
_FAMILIES_WITH_DISKS = ("g5", "g6", "g7e", "p5", "p6", "trn1", "trn2")


def has_own_disk(instance_type: str) -> bool:
    """Whether a machine has NVMe disks of its own, as ml.g5, ml.g4dn and ml.r5d have.

    SageMaker then attaches no volume: the size is fixed, and the hardware encrypts it with a key of
    its own.
    """
    family = instance_type.removeprefix("ml.").split(".")[0]
    return "d" in family or family.startswith(_FAMILIES_WITH_DISKS)
