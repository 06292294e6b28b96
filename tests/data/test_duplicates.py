"""Copies that were changed are found in another place, and different images are not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from visiontuner.data.duplicates import (
    LEAST_SCORE,
    find_duplicates,
    read_thumbnail,
    same_scene,
    similar_pairs,
    unit_length,
)


def scene(seed: int, side: int = 160) -> Image.Image:
    """Random shapes, large and small: detail everywhere, as in a photograph."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(150):
        x, y, width = (int(value) for value in rng.integers(0, side, 3) // (1, 1, 10))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + width, y + width // 2 + 3), fill=colour)
    return image


CHANGES = {
    "mirrored": ImageOps.mirror,
    "turned": lambda image: image.rotate(3),
    "framed": lambda image: ImageOps.expand(image, 10, fill="white"),
    "cropped": lambda image: image.crop((16, 0, 160, 144)),
    "squeezed": lambda image: image.resize((160, 120)),
    "darker": lambda image: image.point(lambda level: level * 0.6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_the_same_scene(change, tmp_path):
    original, copy, other = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    scene(1).save(original)
    CHANGES[change](scene(1)).save(copy)
    scene(2).save(other)
    first, second, third = map(read_thumbnail, (original, copy, other))
    assert same_scene(first, second) > 0.9 > LEAST_SCORE > 0.5 > same_scene(first, third)


def test_images_that_show_nothing_are_not_the_same_scene():
    gray = np.full((96, 96), 100, np.float32)
    assert same_scene(gray, gray + 1) == -1


@pytest.fixture
def units() -> np.ndarray:
    """1,300 rows, some of them near others; more than one block has."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((5200, 64), dtype=np.float32)
    features[-300:] = features[:300] + 0.3 * rng.standard_normal((300, 64), dtype=np.float32)
    return unit_length(features)


def test_candidates_are_those_that_all_products_give(units):
    places = np.arange(len(units)) % 3
    cosines = np.triu(units @ units.T, 1)
    expected = (cosines >= 0.8) & (places[:, None] != places)  # nobody has more than three
    for exact_up_to in (10_000, 10):
        found = similar_pairs(units, places, exact_up_to=exact_up_to)
        assert set(map(tuple, found.rows)) == set(zip(*np.nonzero(expected), strict=True))
        assert (np.diff(found.values) <= 0).all()
        np.testing.assert_allclose(found.values, cosines[tuple(found.rows.T)], atol=1e-5)


def test_each_image_has_three_candidates_at_most_beside_those_that_name_it():
    units = unit_length(np.ones((6, 4), np.float32))
    assert len(similar_pairs(units, np.arange(6))) <= 6 * 3
    assert len(similar_pairs(units, np.zeros(6, np.int64))) == 0


def test_a_pair_is_verified_at_the_pixels(tmp_path):
    """Features that are all alike make candidates of all pairs."""
    paths = [tmp_path / f"{number}.png" for number in range(24)]
    for number, path in enumerate(paths):
        scene(number).save(path)
    ImageOps.mirror(scene(2)).save(paths[13])
    paths[5].write_bytes(b"no image")
    rng = np.random.default_rng(0)
    features = 1 + 0.1 * rng.standard_normal((24, 32), dtype=np.float32)
    features[13] = features[2] + 0.01
    found = find_duplicates(features, np.arange(24) // 12, paths)
    assert found.pairs.rows.tolist() == [[2, 13]]
    assert found.pairs.values[0] > 0.95
    assert found.candidates > 24
    assert found.threshold == LEAST_SCORE


def test_shapes_that_are_all_alike_name_no_pair(tmp_path):
    """Handwritten ones, say: laid over each other they are the same, and nobody copied one."""
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths):
        image = Image.new("L", (96, 96), 255)
        line = (40 + number % 3, 8, 52, 88)
        ImageDraw.Draw(image).line(line, fill=0, width=12 + number % 4)
        image.save(path)
    features = np.ones((30, 8), np.float32)
    found = find_duplicates(features, np.arange(30) % 2, paths)
    assert found.threshold >= 0.95
    assert len(found.pairs) == 0
