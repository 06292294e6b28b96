"""`python -m visiontuner` is the `visiontuner` command."""

from __future__ import annotations

from visiontuner.cli.main import main

if __name__ == "__main__":
    main(prog_name="visiontuner")
