"""Repeat the measurements of docs/benchmarks.md: `make bench`, or `python benchmarks/run.py`.

Prints a Markdown table and writes the numbers to benchmarks/results/. A benchmark reports; it is no
timed test: the exit code is 0 unless a measurement could not be made.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from measuring import Skipped, describe_run, write_json

# Roughly in the order of docs/benchmarks.md. Those in APART take ten minutes to half an hour each,
# so they are run by name.
BENCHMARKS = (
    "quickstart",
    "search_time",
    "floor",
    "mlflow_writing",
    "memory",
    "scale",
    "kills",
    "resume",
    "outage",
    "two_hosts",
    "storage",
    "rules",
    "tensor_rules",
    "recording",
    "compare",
    "serving",
    "serving_load",
    "loader",
    "gpu",
    "interval_coverage",
    "promotion",
    "choice",
    "suspects",
    "odd_images",
    "tables",
    "novelty",
    "heat_maps",
    "leaks",
    "networks",
    "suggest",
    "drift",
    "fine_tune",
    "peer",
)
APART = ("interval_coverage", "promotion", "choice", "networks", "fine_tune", "peer")
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    arguments = _parse()
    if arguments.list:
        for name in BENCHMARKS:
            apart = " (only by name)" if name in APART else ""
            print(f"{name:<18} {first_line(load(name))}{apart}")
        return 0
    names = arguments.only or [name for name in BENCHMARKS if name not in APART]
    context = describe_run()
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    outcomes: dict[str, dict[str, Any]] = {}
    for name in names:
        outcomes[name] = measure(name, arguments)
        # At once: what was measured outlives a later measurement that is stopped.
        write_json(path, {**context, "small": arguments.small, "benchmarks": outcomes})
        for row in outcomes[name]["rows"]:
            print(f"  {row['what']}: {row['result']} (target: {row['target']})", file=sys.stderr)
    print(heading(context, small=arguments.small))
    print(table(outcomes))
    print(f"\nNumbers: {path}")
    return 1 if any("failed" in outcome for outcome in outcomes.values()) else 0


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement's report; `skipped` or `failed` hold the reason why there is none."""
    module = load(name)
    options: dict[str, Any] = dict(module.SMALL) if arguments.small else {}
    if name == "peer" and arguments.limit_per_class is not None:
        options["limit_per_class"] = arguments.limit_per_class
    if name == "choice":
        given = {"repetitions": arguments.repetitions, "rows": arguments.rows}
        options |= {option: value for option, value in given.items() if value is not None}
    print(f"{name}: {first_line(module)}", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        outcome: dict[str, Any] = module.measure(**options)
    except Skipped as reason:
        print(f"{name}: skipped, {reason}", file=sys.stderr)
        return {"rows": [], "skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"rows": [], "failed": f"{type(error).__name__}: {error}"}
    return {**outcome, "seconds": round(time.monotonic() - began, 1)}


def heading(context: dict[str, Any], *, small: bool) -> str:
    machine, code = context["machine"], context["code"]
    dirty = " with uncommitted changes" if code.get("dirty") else ""
    note = "\n**Small settings: a trial of the commands, no results.**" if small else ""
    return (
        f"{context['date']}, commit {str(code.get('commit'))[:12]}{dirty}, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gb']} GB, Python {machine['python']}{note}\n"
    )


def table(outcomes: dict[str, dict[str, Any]]) -> str:
    """The rows of all measurements in Markdown."""
    lines = ["| benchmark | what | target | result | met |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "**no**", None: ""}
    for name, outcome in outcomes.items():
        for row in outcome["rows"]:
            cells = [name, row["what"], row["target"], row["result"], words[row["met"]]]
            lines.append(f"| {' | '.join(cells)} |")
        for reason in ("skipped", "failed"):
            if reason in outcome:
                text = " ".join(outcome[reason].split())[:200].replace("|", "/")
                lines.append(f"| {name} | {reason}: {text} | | | |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the measurements and end")
    parser.add_argument(
        "--only", action="append", choices=BENCHMARKS, help="one measurement; repeatable"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny settings, to see that the commands work"
    )
    parser.add_argument(
        "--limit-per-class", type=int, metavar="N", help="peer: only N images of each class"
    )
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="choice: draw images N times, not 100"
    )
    parser.add_argument(
        "--rows",
        action="append",
        metavar="NAME",
        help="choice: one row, such as 'dogs24 at 20'; repeatable",
    )
    return parser.parse_args()


if __name__ == "__main__":
    # Ended from outside, it still ends its programs and removes its folders.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
