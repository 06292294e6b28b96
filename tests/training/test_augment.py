from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from visiontuner.data.images import Preprocessing, crop_pixels
from visiontuner.experiment.schema import AUGMENTATIONS, NO_AUGMENTATION, Augmentation
from visiontuner.training.augment import Augmenter, mix

SIZE = 32
SMALL = Preprocessing(
    resize=36, size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.25,) * 3, interpolation="bilinear"
)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return Image.open(file)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["light", "strong"])
def test_seed_decides_the_changes(image: Image.Image, name: str) -> None:
    augment = Augmenter(AUGMENTATIONS[name], SMALL)
    first = augment(image, 5)
    assert (first.dtype, tuple(first.shape)) == (torch.uint8, (3, SIZE, SIZE))
    assert torch.equal(first, augment(image, 5))
    assert torch.equal(first, Augmenter(AUGMENTATIONS[name], SMALL)(image, 5))
    assert len({augment(image, seed).numpy().tobytes() for seed in range(8)}) == 8


def test_torchs_own_generator_stays_where_it_was(image: Image.Image) -> None:
    before = torch.get_rng_state()
    Augmenter(AUGMENTATIONS["strong"], SMALL)(image, 5)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    mix(images, labels, Augmentation(mixup=0.2), num_classes=4, generator=generator)
    Augmenter(AUGMENTATIONS["strong"], SMALL)(image, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_without_augmentation_the_crop_is_that_of_evaluation(image: Image.Image) -> None:
    augmented = Augmenter(NO_AUGMENTATION, SMALL)(image, 5)
    np.testing.assert_array_equal(to_array(augmented), crop_pixels(image, SMALL))


def test_flip_is_a_mirror_image(image: Image.Image) -> None:
    augmented = Augmenter(Augmentation(crop_scale=1, flip=1), SMALL)(image, 5)
    mirrored = ImageOps.mirror(Image.fromarray(crop_pixels(image, SMALL)))
    np.testing.assert_array_equal(to_array(augmented), np.asarray(mirrored))


def test_random_crop_is_that_of_torchvision(image: Image.Image) -> None:
    augment = Augmenter(Augmentation(crop_scale=0.3, flip=0), SMALL)
    reference = v2.RandomResizedCrop(SIZE, scale=(0.3, 1.0))
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = np.asarray(reference(image), np.int16)
        difference = np.abs(to_array(augment(image, seed)).astype(np.int16) - expected)
        assert difference[1:-1, 1:-1].max() == 0
        assert difference.max() < 8  # at its edge Pillow looks beyond the crop, at the image


def test_jpeg_decoded_small_is_nearly_the_same_crop(image: Image.Image) -> None:
    augment = Augmenter(Augmentation(crop_scale=0.5, flip=0), SMALL)
    drafted = 0
    for seed in range(20):
        lazy, whole = as_jpeg(image), as_jpeg(image)
        whole.load()  # decoded at full size: nothing left to draft
        small = to_array(augment(lazy, seed)).astype(np.int16)
        drafted += lazy.width < image.width
        assert np.abs(small - to_array(augment(whole, seed))).mean() < 3
    assert drafted > 10


def test_crop_of_an_image_smaller_than_the_input_enlarges_it() -> None:
    tiny = Image.new("RGB", (3, 2), (10, 200, 30))
    augmented = Augmenter(Augmentation(crop_scale=0.1), SMALL)(as_jpeg(tiny), 1)
    colour = np.array([10, 200, 30])
    assert np.abs(to_array(augmented).astype(int) - colour).max() <= 3


def test_erased_pixels_have_the_mean_colour() -> None:
    white = Image.new("RGB", (64, 64), "white")
    augmented = to_array(Augmenter(Augmentation(erasing=1), SMALL)(white, 3))
    mean = [102, 128, 153]  # 255 times 0.4, 0.5, 0.6, rounded
    erased = (augmented == mean).all(axis=2)
    # torchvision erases 2 to 33 % of the area.
    assert 0.02 * 0.9 < erased.mean() < 0.33 * 1.1
    assert (augmented[~erased] == 255).all()


@pytest.mark.parametrize("policy", ["randaugment", "trivial"])
def test_policy_changes_colours_or_shapes(image: Image.Image, policy: str) -> None:
    plain = Augmenter(Augmentation(crop_scale=1, flip=0), SMALL)(image, 0)
    augment = Augmenter(Augmentation(crop_scale=1, flip=0, policy=policy), SMALL)
    changed = [not torch.equal(augment(image, seed), plain) for seed in range(20)]
    assert sum(changed) > 10


def one_image_a_class(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(number, 3, 16, 16), torch.arange(number)


def test_mixup_blends_images_and_labels_by_the_same_shares() -> None:
    images, labels = one_image_a_class(4)
    generator = torch.Generator().manual_seed(0)
    mixed, shares = mix(images, labels, Augmentation(mixup=1), num_classes=4, generator=generator)
    assert (shares.dtype, tuple(shares.shape)) == (torch.float32, (4, 4))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
    assert 0 < shares[0, 0] < 1
    torch.testing.assert_close(mixed, torch.einsum("bc,cijk->bijk", shares, images))


def test_cutmix_shares_are_those_of_the_area() -> None:
    images, labels = one_image_a_class(4)
    mixed, shares = mix(
        images,
        labels,
        Augmentation(cutmix=1),
        num_classes=4,
        generator=torch.Generator().manual_seed(3),
    )
    own = (mixed == images).all(dim=1).float().mean(dim=(1, 2))
    assert 0 < own[0] < 1
    torch.testing.assert_close(shares.diagonal(), own)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))


def test_with_both_some_batches_are_blended_and_some_are_cut() -> None:
    images, labels = one_image_a_class(2)
    generator = torch.Generator().manual_seed(0)
    both = Augmentation(mixup=1, cutmix=1)
    cut = [
        bool(
            torch.isin(
                mix(images, labels, both, num_classes=2, generator=generator)[0], images
            ).all()
        )
        for _ in range(20)
    ]
    assert 0 < sum(cut) < 20


def test_mixing_one_image_leaves_it() -> None:
    images, labels = one_image_a_class(1)
    mixed, shares = mix(
        images, labels, Augmentation(mixup=1), num_classes=3, generator=torch.Generator()
    )
    torch.testing.assert_close(mixed, images)
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0, 0.0]]))


def test_mixing_needs_to_be_on() -> None:
    images, labels = one_image_a_class(2)
    with pytest.raises(ValueError, match="mixup or cutmix"):
        mix(images, labels, Augmentation(), num_classes=2, generator=torch.Generator())
