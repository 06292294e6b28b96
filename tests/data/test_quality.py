import numpy as np
import pytest
from PIL import Image, ImageFilter

from visiontuner.data.findings import SHARPEST, are_blurred, are_dark, brightness, sharpness


def photograph(side: int = 256) -> Image.Image:
    """Overlapping discs of all sizes, which have edges and texture at every scale."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    pixels = np.full((side, side, 3), 120.0)
    for _ in range(200):
        inside = (x - rng.random()) ** 2 + (y - rng.random()) ** 2 < (0.02 / rng.random()) ** 2 / 10
        pixels[inside] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def test_sharpness_falls_with_blur_and_does_not_depend_on_size() -> None:
    sharp = photograph(512)
    measured = [
        sharpness(sharp.filter(ImageFilter.GaussianBlur(pixels * 512 / 224)) if pixels else sharp)
        for pixels in (0, 1.5, 3, 6)
    ]
    assert measured == sorted(measured, reverse=True)
    assert measured[0] > 1 > measured[2]
    assert sharpness(sharp.resize((256, 256))) == pytest.approx(measured[0], rel=0.15)


def test_a_sharp_part_is_enough() -> None:
    image = photograph().filter(ImageFilter.GaussianBlur(5))
    assert sharpness(image) < 0.5
    image.paste(photograph().crop((64, 64, 192, 192)), (64, 64))
    assert sharpness(image) > 1


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (17, 17), (300, 200)])
def test_an_image_without_detail_is_not_called_blurred(size: tuple[int, int]) -> None:
    assert sharpness(Image.new("RGB", size, "gray")) == SHARPEST


def test_brightness_is_what_a_twentieth_of_the_pixels_reach_in_any_colour() -> None:
    pixels = np.zeros((10, 10, 3), dtype=np.uint8)
    pixels[0, :5, 0] = 200  # 5 of 100 are red
    assert brightness(Image.fromarray(pixels)) == 0
    pixels[0, 5, 2] = 180  # and one is blue
    assert brightness(Image.fromarray(pixels)) == 180
    assert brightness(Image.new("RGB", (4, 4), (0, 0, 90))) == 90


def test_odd_is_odd_beside_the_other_images() -> None:
    assert are_blurred(np.array([2.0, 2.0, 0.9, 3.0])).tolist() == [False, False, True, False]
    assert not are_blurred(np.array([0.9, 0.8, 0.9])).any()  # all are soft
    assert are_dark(np.array([200.0, 80.0, 220.0])).tolist() == [False, True, False]
    assert not are_dark(np.array([60.0, 80.0, 70.0])).any()  # taken at night
    assert are_dark(np.empty(0)).tolist() == []
