"""A Gradio Space of a classifier: a folder that runs anywhere, without visiontuner being installed.

    app.py             the page, with Gradio
    requirements.txt   what it needs; Gradio wants an older Pillow than visiontuner has
    README.md          the card that Hugging Face reads
    classifier/        the artifact, without the images of its reference
    visiontuner/       the few modules that read it

Nothing in it says where it was made.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import visiontuner
from visiontuner.errors import UserMistake, VisiontunerError
from visiontuner.io.files import temporary_folder
from visiontuner.model.classifier import REFERENCE
from visiontuner.serving.registry import CODE

_MODULES = (*CODE, "model/heatmaps.py")
# Gradio decides on the version of Pillow and pandas.
_PINNED = ("onnxruntime", "numpy", "safetensors")
_APP = Path(__file__).with_name("space_app.py")


def write_space(classifier: Path, folder: Path, *, title: str) -> Path:
    """Write the folder of a Space, whole or not at all.

    Args:
        classifier: a classifier folder.
        title: what the page and the card call it.

    Raises:
        UserMistake: there is something at that place already.
        VisiontunerError: it cannot be written.
    """
    if folder.exists():
        raise UserMistake(f"{folder} already exists. Name another folder, or delete it.")
    source = Path(visiontuner.__file__).parent
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            temporary.chmod(0o755)
            # The reference holds validation images, which a page for everybody does not need.
            shutil.copytree(
                classifier, temporary / "classifier", ignore=shutil.ignore_patterns(REFERENCE)
            )
            for name in _MODULES:
                path = temporary / "visiontuner" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, path)
            shutil.copyfile(_APP, temporary / "app.py")
            (temporary / "requirements.txt").write_text(_requirements())
            (temporary / "README.md").write_text(_card(title), encoding="utf-8")
            temporary.replace(folder)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}). Make room.") from None
    return folder


def _requirements() -> str:
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in _PINNED]
    return "\n".join([*pinned, "pandas", "pillow", "gradio>=5"]) + "\n"


def _card(title: str) -> str:
    """Hugging Face reads the lines between the dashes as YAML, of which JSON is a part."""
    return (
        f"---\ntitle: {json.dumps(title)}\nsdk: gradio\napp_file: app.py\npinned: false\n---\n\n"
        f"# {title}\n\nAn image classifier, made with visiontuner. Run it here:\n\n"
        "    pip install -r requirements.txt\n    python app.py\n"
    )
