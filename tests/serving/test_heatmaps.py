"""What decided, on the classifier of colours: its map is the image itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

from visiontuner.cli.serve import query
from visiontuner.errors import ClassifierError
from visiontuner.model.classifier import Classifier
from visiontuner.model.heatmaps import Explainer

# Of a channel of 220 and one of 20, normalised, times the weight 4.
BRIGHT, DARK = 4 * (220 / 255 - 0.5) / 0.5, 4 * (20 / 255 - 0.5) / 0.5


@pytest.fixture
def half_red() -> np.ndarray:
    """16 x 16 pixels: three quarters red on the left, the rest blue."""
    pixels = np.full((16, 16, 3), (220, 20, 20), dtype=np.uint8)
    pixels[:, 12:] = (20, 20, 220)
    return pixels


def test_a_map_is_what_each_place_adds_to_the_logit(
    colour_classifier: Path, half_red: np.ndarray
) -> None:
    classifier = Classifier.load(colour_classifier)
    (heat,) = Explainer(classifier).explain(half_red[None])
    assert classifier.class_names[heat.label] == "red"
    assert heat.values.shape == (16, 16)
    np.testing.assert_allclose(heat.values[:, :12], BRIGHT, rtol=1e-5)
    np.testing.assert_allclose(heat.values[:, 12:], DARK, rtol=1e-5)
    assert heat.logit == pytest.approx((12 * BRIGHT + 4 * DARK) / 16, abs=1e-5)
    bias = load_file(colour_classifier / "weights.safetensors")["head.bias"]
    assert heat.values.mean() + bias[heat.label] == pytest.approx(heat.logit, abs=1e-5)
    (blue,) = Explainer(classifier).explain(half_red[None], np.array([2]))
    np.testing.assert_allclose(blue.values[:, :12], DARK, rtol=1e-5)


def test_colour_lies_where_the_class_was_seen(
    colour_classifier: Path, half_red: np.ndarray
) -> None:
    (heat,) = Explainer(Classifier.load(colour_classifier)).explain(half_red[None])
    size = heat.resized(16)
    np.testing.assert_allclose(size, (heat.values > 0).astype(np.float32), atol=1e-5)
    drawn = heat.over(half_red)
    plain = 0.5 * half_red + 0.5 * half_red.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(drawn[:, 12:], plain[:, 12:], atol=1)
    assert (drawn[:, :12, :2].astype(int) > plain[:, :12, :2] + 50).all()  # yellow


def test_query_draws_an_image_for_each(
    colour_classifier: Path,
    make_image: Callable[..., bytes],
    half_red: np.ndarray,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "b.png").write_bytes(b"no image")
    Image.fromarray(half_red).resize((160, 160), Image.Resampling.NEAREST).save(folder / "a.png")
    why = tmp_path / "why"
    arguments = ["--model", str(colour_classifier), str(folder), "--explain", str(why)]
    done = CliRunner().invoke(query, arguments)
    assert done.exit_code == 1  # one file is no image
    assert f"Heat maps: {why}" in done.stderr
    (drawn,) = why.iterdir()
    assert drawn.name == "0001 a (red).png"
    with Image.open(drawn) as image:
        assert image.size == (16, 16)
    piped = CliRunner().invoke(
        query,
        ["--model", str(colour_classifier), "-", "--explain", str(why), "--format", "json"],
        input=make_image("blue"),
    )
    assert piped.exit_code == 0, piped.output
    assert (why / "0001 - (blue).png").is_file()


def test_what_cannot_be_explained_is_said_in_one_line(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(make_image("red"))
    asked = [str(tmp_path / "a.png"), "--explain", str(tmp_path / "why")]
    done = CliRunner().invoke(query, ["--local", *asked])
    assert done.exit_code == 2
    assert "ask it with --model" in done.stderr

    folder = tmp_path / "c"
    folder.mkdir()
    for path in colour_classifier.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    network = onnx.load(folder / "model.onnx")
    del network.graph.output[2]
    onnx.save(network, folder / "model.onnx")
    with pytest.raises(ClassifierError, match="has no heat maps"):
        Explainer(Classifier.load(folder))
    done = CliRunner().invoke(query, ["--model", str(folder), *asked])
    assert done.exit_code != 0
    assert len(done.stderr.splitlines()) == 1
    assert "has no heat maps: they need a network that ends in a plain mean" in done.stderr


def test_damaged_weights_are_refused(colour_classifier: Path, tmp_path: Path) -> None:
    for path in colour_classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "weights.safetensors").write_bytes(b"junk")
    explainer = Explainer(Classifier.load(tmp_path))
    with pytest.raises(ClassifierError, match=r"weights\.safetensors is damaged"):
        explainer.explain(np.zeros((1, 16, 16, 3), np.uint8))
