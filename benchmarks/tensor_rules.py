"""Which rules on recordings fire on trainings made to fail, and on healthy ones?

Real trainings of networks on flowers5. Each failing one has to raise its error; none of the ten
healthy ones, of two architectures, may raise any. Tensors are recorded every tenth step, since the
trainings are short.
"""

from __future__ import annotations

import gc
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Row, photographs, report, scratch

TARGETS = (
    "at least 8 rules fire as errors",
    "no error on 10 healthy trainings",
)
SMALL = {"failing": 2, "healthy": 1, "epochs_of_a_leak": 1}
EVERY_STEPS = 10


def measure(
    *, failing: int | None = None, healthy: int | None = None, epochs_of_a_leak: int = 60
) -> dict[str, Any]:
    import failing_trainings as trainings

    from visiontuner.paths import writable_cache_folder

    flowers, seconds = photographs("flowers5"), []
    with scratch() as folder:
        stores = {
            size: trainings.images(flowers, writable_cache_folder(), size=size) for size in (64, 96)
        }
        found: dict[str, dict[str, list[Any]]] = {"failing": {}, "healthy": {}}
        cases = islice(trainings.failing(leaking=epochs_of_a_leak), failing)
        expected = {}
        for case in cases:
            expected[case.name] = case.rules
            found["failing"][case.name] = _judged(case, stores[64], folder, seconds)
        for case in islice(trainings.healthy(), healthy):
            size = 96 if "lite0" in case.name else 64
            found["healthy"][case.name] = _judged(case, stores[size], folder, seconds)
    return report(_rows(found, expected, median(seconds)), found=found)


def _judged(case: Any, store: Any, folder: Path, seconds: list[float]) -> list[dict[str, Any]]:
    """What all rules on recordings say of one training."""
    import failing_trainings as trainings

    from visiontuner.diagnostics.rules import RECORDED_RULES, diagnose_recording

    history = trainings.train(case, store, folder, every_steps=EVERY_STEPS)
    gc.collect()  # what leaked is no longer of use
    began = time.perf_counter()
    findings = diagnose_recording(history, RECORDED_RULES)
    seconds.append(time.perf_counter() - began)
    losses = [round(loss, 3) for loss in history.curve("train_loss").values]
    print(f"  {case.name}: training loss {losses}", file=sys.stderr)
    for finding in findings:
        print(f"    {finding.severity} {finding.rule}: {finding.evidence}", file=sys.stderr)
    return [vars(finding) for finding in findings]


def _rows(
    found: dict[str, dict[str, list[Any]]], expected: dict[str, tuple[str, ...]], seconds: float
) -> list[Row]:
    errors = {
        name: {f["rule"] for f in findings if f["severity"] == "error"}
        for name, findings in found["failing"].items()
    }
    fired = {rule for name, rules in expected.items() for rule in rules if rule in errors[name]}
    missed = [f"{rule} ({name})" for name, rules in expected.items() for rule in rules
              if rule not in errors[name]]  # fmt: skip
    healthy = [f for findings in found["healthy"].values() for f in findings]
    false, noise = (
        sorted(f["rule"] for f in healthy if f["severity"] == severity)
        for severity in ("error", "warning")
    )
    return [
        Row(
            what=f"rules that fire as errors on {len(expected)} trainings made to fail their way",
            target=TARGETS[0],
            result=f"{len(fired)}" + (f", missed: {', '.join(missed)}" if missed else ""),
            met=len(fired) >= 8,
        ),
        Row(
            what=f"errors on {len(found['healthy'])} healthy trainings of two architectures",
            target=TARGETS[1],
            result=f"{len(false)} {false or ''}, {len(noise)} warnings {noise or ''}".strip(),
            met=not false,
        ),
        Row(
            what="all rules on one recording, median",
            target="",
            result=f"{1000 * seconds:.1f} ms",
        ),
    ]
