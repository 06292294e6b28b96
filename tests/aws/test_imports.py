"""What works without the SageMaker SDK: everything but the submitting of jobs.

That a search does is tested in test_secrets_and_connections.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Hears of each look for the SDK, and runs commands one after the other.
SCRIPT = """
import json, sys
class Hearing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "sagemaker":
            print("looked for the SDK", flush=True)
sys.meta_path.insert(0, Hearing())
from visiontuner.cli.main import main
for arguments in json.loads(sys.argv[1]):
    print(">>>", *arguments, flush=True)
    try:
        main(arguments, prog_name="visiontuner")
    except SystemExit:
        pass
"""


@pytest.mark.usefixtures("aws")
def test_help_and_questions_to_models_never_import_the_sdk(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(make_image("red"))
    commands = {
        "--help": "Usage: visiontuner",
        "tune --help": "Usage: visiontuner tune",
        "query --help": "Usage: visiontuner query",
        f"query --model {colour_classifier} red.png": "red",
        "query nobody red.png": "nobody",  # it gets as far as SageMaker
        "jobs": "None.",
        "attach nobody": "There is no training job 'nobody'",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([command.split() for command in commands])],
        cwd=tmp_path,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert "looked for the SDK" not in done.stdout
    printed = done.stdout.split(">>> ")[1:]
    for (command, said), text in zip(commands.items(), printed, strict=True):
        assert text.startswith(command)
        assert said in text.removeprefix(command), text
