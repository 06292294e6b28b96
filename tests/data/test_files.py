"""Temporary folders of processes that were killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from visiontuner.io.files import temporary_folder

CHILD = """
import sys
from pathlib import Path
from visiontuner.io.files import temporary_folder

with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    sys.stdin.read()
"""


def aged(folder: Path) -> Path:
    os.utime(folder, (0, 0))
    return folder


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as alive:
        left, used = (aged(Path(p.stdout.readline().strip())) for p in (killed, alive))
        killed.kill()
        killed.wait()
        others = [tmp_path / name for name in ("visiontuner-tmp-mine", ".visiontuner-old", "data")]
        for other in others:
            other.mkdir()
            aged(other)
        with temporary_folder(tmp_path) as mine:
            assert not left.exists()
            assert (used / "half").exists()
            assert mine.is_dir()
            assert all(other.exists() for other in others)
        alive.communicate("end")
    assert not mine.exists()
    assert not used.exists()


def test_a_new_folder_may_take_another_name(tmp_path):
    with temporary_folder(tmp_path) as folder:
        (folder / "file").write_text("x")
        folder.rename(tmp_path / "target")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "file"]


def test_by_default_it_is_where_the_system_has_such_folders():
    with temporary_folder() as folder:
        assert folder.parent == Path(tempfile.gettempdir())
