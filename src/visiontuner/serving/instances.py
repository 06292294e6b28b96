"""Which SageMaker instance a served model needs."""

from __future__ import annotations

# Name, vCPUs, memory in GiB; from the smallest, of families that every region has.
_INSTANCES = (
    ("ml.c5.large", 2, 4),
    ("ml.m5.large", 2, 8),
    ("ml.m5.xlarge", 4, 16),
    ("ml.m5.2xlarge", 8, 32),
)
_SERVERLESS_MB = (1024, 2048, 3072, 4096, 5120, 6144)

_ROOM = 1.5  # several large photographs at a time, on top of what was measured
_SYSTEM_MB = 500  # nginx, MLflow's parent process, the agent


def recommend(*, memory_mb: float, pictures_per_second: float) -> str:
    """The smallest instance whose memory holds the server, and serverless if that does.

    Args:
        memory_mb: what the server held under load, in 10^6 bytes.
        pictures_per_second: measured on this machine, for the sentence.
    """
    needed = memory_mb * _ROOM + _SYSTEM_MB
    fitting = [one for one in _INSTANCES if needed <= one[2] * 1024]
    name, cpus, gigabytes = fitting[0] if fitting else _INSTANCES[-1]
    text = f"{name} ({cpus} vCPUs, {gigabytes} GB): the server needs {needed / 1000:.1f} GB"
    if not fitting:
        text += ", more than that has; choose one with more"
    serverless = next((size for size in _SERVERLESS_MB if needed <= size), None)
    if serverless:
        text += f". For a few requests a minute: serverless with {serverless} MB"
    return f"{text}. This machine answers {pictures_per_second:.0f} pictures a second."
