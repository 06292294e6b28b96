"""`python -m visiontuner` is the `visiontuner` command."""

from visiontuner.cli import main

if __name__ == "__main__":
    main(prog_name="visiontuner")
