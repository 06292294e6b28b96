"""What an image looks like once it is pixels, against torchvision and by hand."""

import errno
import gzip
import io
import os
import re
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import normalize, to_tensor

from visiontuner.data import images
from visiontuner.data.images import (
    Preprocessing,
    crop_pixels,
    decode_image,
    image_extensions,
    normalise,
    read_pixels,
)
from visiontuner.errors import BadImageError, ClassifierError, DiskError

IMAGENET = Preprocessing(
    resize=36,
    size=32,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def pixel(source: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = decode_image(source)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


SIZES = [(64, 64), (65, 37), (37, 65), (33, 200), (20, 20), (5, 90), (36, 36), (1, 1), (99, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_crop_equals_torchvision(size, interpolation):
    preprocessing = Preprocessing(
        resize=36, size=33, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation
    )
    image = noise(*size)
    reference = v2.Compose(
        [v2.Resize(36, interpolation=InterpolationMode(interpolation)), v2.CenterCrop(33)]
    )
    np.testing.assert_array_equal(crop_pixels(image, preprocessing), np.asarray(reference(image)))


@pytest.mark.parametrize("size", [(20, 20), (64, 21), (21, 64), (19, 44)], ids=str)
def test_crop_larger_than_the_resized_image_is_padded_like_torchvision(size):
    preprocessing = Preprocessing(
        resize=20, size=33, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"
    )
    image = noise(*size)
    reference = v2.Compose([v2.Resize(20), v2.CenterCrop(33)])(image)
    np.testing.assert_array_equal(crop_pixels(image, preprocessing), np.asarray(reference))


def test_normalised_input_equals_torchvision_bit_for_bit():
    image = noise(50, 41)
    levels = v2.Compose([v2.Resize(36), v2.CenterCrop(32)])(image)
    reference = normalize(to_tensor(levels), IMAGENET.mean, IMAGENET.std).numpy()
    batch = normalise(crop_pixels(image, IMAGENET)[None], IMAGENET)
    assert batch.dtype == np.float32
    assert batch.shape == (1, 3, 32, 32)
    assert batch.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(batch[0], reference)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)], ids=str)
def test_an_extremely_long_image_costs_little_memory(size):
    assert (crop_pixels(Image.new("RGB", size, (9, 8, 7)), IMAGENET) == (9, 8, 7)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(orientation, name):
    image = noise(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "WEBP" else {}
    content = encoded(image, name, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(np.asarray(decode_image(content)), expected)
    assert (expected.shape[:2] == (5, 3)) == (orientation >= 5)


def test_exif_rotation_by_hand():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise, the left end comes to the top
    upright = decode_image(encoded(image, "PNG", exif=exif))
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


def test_damaged_exif_data_does_not_spoil_the_image():
    content = encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(content).size == (8, 8)


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 4), (100, 0)), "PNG", (100, 100, 100)),
        (Image.new("LA", (4, 4), (100, 255)), "PNG", (100, 100, 100)),
        # Alpha that is 0 everywhere is no alpha.
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", (255, 0, 0)),
        # 51 / 255 = 0.2: 0.2 * 255 + 0.8 * 255 and 0.2 * 0 + 0.8 * 255
        (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG", (255, 204, 204)),
        (Image.new("P", (4, 4), 0), "GIF", (0, 0, 0)),
        (Image.new("I;16", (4, 4), 65535), "PNG", (255, 255, 255)),
        (Image.new("I;16", (4, 4), 257 * 100), "TIFF", (100, 100, 100)),
        (Image.new("I;16B", (4, 4), 257 * 100), "TIFF", (100, 100, 100)),
        (Image.new("I", (4, 4), 257 * 100), "TIFF", (100, 100, 100)),
        (Image.new("F", (4, 4), 0.2), "TIFF", (51, 51, 51)),
        # 0 is black and 1 is white, whatever else the image holds.
        (Image.new("F", (4, 4), 1.02), "TIFF", (255, 255, 255)),
        (Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF", (254, 255, 254)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "BMP", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "TGA", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "PPM", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "SGI", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "JPEG2000", (1, 2, 3)),
        (Image.new("RGB", (16, 16), (1, 2, 3)), "ICO", (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_modes_and_formats_are_read_as_a_person_sees_them(image, name, expected):
    assert pixel(encoded(image, name)) == expected


def test_cmyk_jpeg_is_read_as_rgb():
    red, green, blue = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 250
    assert max(green, blue) < 5


def test_16_bit_portable_graymap_is_scaled():
    assert pixel(b"P5 1 1 65535\n" + (257 * 9).to_bytes(2, "big")) == (9, 9, 9)


def tiff_of(values: np.ndarray, *, bits: int, photometric: int = 1, signed: bool = False) -> bytes:
    """One row, little-endian; 12 bits are packed."""
    if bits == 12:
        pairs = values.reshape(-1, 2)
        packed = [[a >> 4, (a & 15) << 4 | b >> 8, b & 255] for a, b in pairs.tolist()]
        data = bytes(byte for triple in packed for byte in triple)
    else:
        data = values.astype("<i2" if signed else "<u2").tobytes()
    kind = 2 if signed else 1
    tags = [(256, 3, 1, len(values)), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1),
            (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1),
            (279, 4, 1, len(data)), (339, 3, 1, kind)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def with_significant_bits(png: bytes, bits: int) -> bytes:
    chunk = b"sBIT" + bytes([bits])
    crc = struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + struct.pack(">I", 1) + chunk + crc + png[33:]  # after the header


def reds(content: bytes) -> list[int]:
    image = decode_image(content)
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


def test_12_bits_that_a_tiff_declares_are_scaled_by_its_depth():
    values = np.array([0, 1606, 4095, 803])  # 1,606 / 4,095 * 255 = 100
    assert reds(tiff_of(values, bits=12)) == [0, 100, 255, 50]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1606, 4095], [0, 100, 255]),  # written as they are
        ([0, 803, 1607], [0, 50, 100]),  # and none of them bright
        ([0, 1606 * 16, 65535], [0, 100, 255]),  # scaled to 16 bits, as the specification asks
        ([0, 0x0110, 0x0FF0], [0, 1, 16]),  # scaled, and none of them bright
    ],
)
def test_12_bits_that_a_png_declares_are_scaled_by_its_depth(values, expected):
    png = encoded(Image.fromarray(np.array([values], dtype=np.uint16)), "PNG")
    assert reds(with_significant_bits(png, 12)) == expected


def test_the_scale_does_not_depend_on_the_brightest_pixel():
    """An image's own range says nothing: its neighbours in the data set have another."""
    for brightest in (1.0, 1.02, 1.9):
        values = np.array([[0.2, brightest, -0.1, np.nan]], dtype=np.float32)
        assert reds(encoded(Image.fromarray(values), "TIFF")) == [51, 255, 0, 0]
    for brightest in (200, 300, 65535):
        values = np.array([[257 * 100, brightest]], dtype=np.int32)
        assert reds(encoded(Image.fromarray(values), "TIFF"))[0] == 100


@pytest.mark.parametrize("values", [[0.0, 200.0], [-5.0, 0.5], [-70_000, 5], [5, 200_000]], ids=str)
def test_values_of_another_scale_than_the_declared_one_are_refused(values):
    dtype = np.float32 if isinstance(values[1], float) else np.int32
    content = encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")
    with pytest.raises(BadImageError, match=r"has values from .* is read: convert it to 8 or 16"):
        decode_image(content)


def test_where_white_is_zero_16_bits_are_inverted():
    assert reds(tiff_of(np.array([65535, 257 * 100, 0]), bits=16, photometric=0)) == [0, 155, 255]


def test_signed_16_bits_are_black_at_0():
    assert reds(tiff_of(np.array([-9, 0, 32767]), bits=16, signed=True)) == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "P", "L", "1", "I;16", "F", "YCbCr"])
def test_an_image_converted_in_strips_equals_one_converted_whole(mode, monkeypatch):
    levels = np.random.default_rng(1).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    if mode == "F":
        image = Image.fromarray(levels[..., 0].astype(np.float32) / 255)
    elif mode == "I;16":
        image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(levels).convert(mode)
    content = encoded(image, "TIFF")
    whole = np.asarray(decode_image(content))
    monkeypatch.setattr(images, "_STRIP_PIXELS", 200)  # 3 rows
    np.testing.assert_array_equal(np.asarray(decode_image(content)), whole)


def test_transparent_palette_is_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    opaque_second = encoded(image, "PNG", transparency=bytes([0, 255]))
    image.putpixel((3, 3), 0)
    clear_second = encoded(image, "PNG", transparency=1)
    assert pixel(opaque_second) == (200, 100, 50)
    assert pixel(clear_second) == (255, 255, 255)


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(name):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if name == "WEBP" else {}
    content = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert pixel(content) == (255, 0, 0)


def test_multi_image_jpeg_is_its_first_image():
    content = encoded(
        Image.new("RGB", (32, 32), "red"),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (32, 32), "blue")],
    )
    assert pixel(content)[0] > 250
    assert decode_image(content, target=4).size == (8, 8)


def test_a_large_jpeg_is_decoded_at_no_less_than_twice_the_target():
    content = encoded(noise(801, 1203), "JPEG")
    assert decode_image(content).size == (801, 1203)
    assert decode_image(content, target=100).size == (201, 301)  # a quarter, rounded up
    assert decode_image(content, target=101).size == (401, 602)  # a quarter would be 201 < 202
    assert decode_image(encoded(noise(801, 1203), "BMP"), target=100).size == (801, 1203)


def test_a_rotated_jpeg_is_reduced_by_its_shorter_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise(800, 400), "JPEG", exif=exif)
    assert decode_image(content, target=50).size == (100, 200)


def test_bytes_and_path_give_the_same_pixels(tmp_path):
    content = encoded(noise(300, 200), "JPEG")
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    pixels = read_pixels(path, IMAGENET)
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels, read_pixels(content, IMAGENET))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
        (encoded(noise(64, 64), "PNG")[:900], "truncated"),
        (b"GIF89a" + bytes(7), "Cannot read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS images are not decoded"),
    ],
    ids=["empty", "text", "html", "half a JPEG", "half a PNG", "no pixels", "PostScript"],
)
def test_a_bad_image_is_one_clear_line(content, reason, tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(BadImageError, match=reason) as caught:
            decode_image(source)
        assert "\n" not in str(caught.value)
    assert "bad.jpg" in str(caught.value)


def test_a_missing_file_and_a_folder_are_bad_images(tmp_path):
    with pytest.raises(BadImageError, match="No such file"):
        decode_image(tmp_path / "nothing.png")
    with pytest.raises(BadImageError):
        decode_image(tmp_path)


def test_a_decompression_bomb_is_refused_from_its_header():
    bomb = bytearray(encoded(Image.new("L", (1, 1)), "BMP"))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(BadImageError, match="allowed"):
        decode_image(bytes(bomb))
    with pytest.raises(BadImageError, match=r"20 x 10 pixels are more than the 199 allowed"):
        decode_image(encoded(noise(20, 10), "PNG"), max_pixels=199)
    assert decode_image(encoded(noise(20, 10), "PNG"), max_pixels=200).size == (20, 10)


def gzipped_fits(side: int) -> bytes:
    cards = {
        "XTENSION": "'BINTABLE'", "BITPIX": "8", "NAXIS": "2", "NAXIS1": "8", "NAXIS2": "1",
        "ZIMAGE": "T", "ZCMPTYPE": "'GZIP_1  '", "ZBITPIX": "8", "ZNAXIS": "2",
        "ZNAXIS1": str(side), "ZNAXIS2": str(side),
    }  # fmt: skip
    extension = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in cards.items())
    first = "SIMPLE  =                    T".ljust(80) + "NAXIS   =                    0".ljust(80)
    headers = [(header + "END").ljust(2880).encode() for header in (first, extension)]
    return b"".join(headers) + gzip.compress(bytes(side * side))


def rle_bitmap(side: int) -> bytes:
    """A bitmap of one colour, run-length encoded, without its file header: as icons hold it."""
    header = struct.pack("<IiiHHIIiiII", 40, side, 2 * side, 1, 8, 1, 0, 0, 0, 256, 0)
    return header + bytes(range(256)) * 4 + (bytes((side, 7)) + b"\0\0") * side + b"\0\1"


def icon(inner: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, len(inner), 22) + inner


DECODED_IN_PYTHON = {
    "FITS": gzipped_fits(16),
    "QOI": encoded(noise(16, 16), "QOI"),
    "ICNS": encoded(noise(16, 16), "ICNS", sizes=[(16, 16)]),
    "XPM": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #ffffff",\n"a"\n};',
    "BLP": encoded(noise(16, 16).quantize(16), "BLP"),
    "MSP": encoded(Image.new("1", (16, 16)), "MSP"),
    "BMP images of this kind (bmp_rle)": b"BM"
    + struct.pack("<IHHI", 0, 0, 0, 1078)
    + rle_bitmap(16),
    "DIB images of this kind (bmp_rle)": icon(rle_bitmap(16)),
    "PPM images of this kind (ppm_plain)": b"P2 2 2 255 1 2 3 4 ",
    "PPM images of this kind (ppm)": b"P5 2 2 100 1234",
}


@pytest.mark.parametrize("what", DECODED_IN_PYTHON)
def test_what_pillow_decodes_in_python_is_refused_by_its_name(what, monkeypatch):
    """A decoder in Python holds the interpreter, 20 s for 200 kB: no other request is answered."""
    started = []
    monkeypatch.setattr(ImageFile.PyDecoder, "__init__", lambda *_, **__: started.append(what))
    name = re.escape(what) if " " in what else f"{what} images"
    with pytest.raises(BadImageError, match=rf"{name} are not decoded: convert to PNG\.$"):
        decode_image(DECODED_IN_PYTHON[what])
    assert not started


def test_heic_is_read_where_pillow_heif_is_there_and_else_names_it():
    if "HEIF" in images.image_formats():
        assert pixel(encoded(Image.new("RGB", (64, 64)), "HEIF")) == (0, 0, 0)
        assert {".heic", ".heif"} <= set(image_extensions())
        return
    assert ".heic" not in image_extensions()
    with pytest.raises(BadImageError, match=r"HEIC images .* install pillow-heif, or convert to"):
        decode_image(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")


def test_every_decoder_that_is_let_through_is_in_c():
    for name in images._C_DECODERS:
        assert name not in Image.DECODERS
        assert hasattr(Image.core, f"{name}_decoder"), name


def test_the_image_within_an_icon_is_checked_before_it_is_decoded():
    large = icon(encoded(Image.new("L", (900, 900)), "PNG"))  # the icon says 16 x 16
    with pytest.raises(BadImageError, match=r"900 x 900 pixels are more than the 1,000 allowed"):
        decode_image(large[:-40], max_pixels=1000)  # decoding would find it truncated
    assert decode_image(large).size == (900, 900)


def test_a_jpeg_of_countless_scans_is_refused():
    """Each scan costs a pass over all pixels and 26 bytes of the file."""
    content = encoded(noise(64, 64), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    assert decode_image(content[:-2] + content[last:-2] * 80 + content[-2:]).size == (64, 64)
    with pytest.raises(BadImageError, match="more than the 100 scans allowed"):
        decode_image(content[:-2] + content[last:-2] * 100 + content[-2:])
    # What follows the image, such as the film of a phone's photograph, has no scans.
    assert decode_image(content + b"\xff\xda" * 200).size == (64, 64)


def test_an_uncompressed_tiff_of_countless_strips_is_refused():
    rows = 100_001
    offsets = struct.pack("<I", 8) * rows
    tags = [(256, 3, 1, 1), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, rows, 8), (277, 3, 1, 1), (278, 3, 1, 1)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(offsets)) + offsets + directory + bytes(4)
    with pytest.raises(BadImageError, match="100,001 strips"):
        decode_image(content)


def test_pillow_warnings_do_not_reach_the_caller(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1,600 pixels: Pillow warns, no error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded(noise(40, 40), "PNG")).size == (40, 40)


def test_many_threads_decode_at_once():
    content, results = encoded(noise(60, 60), "PNG"), []
    threads = [
        threading.Thread(target=lambda: results.append(decode_image(content).size))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(60, 60)] * 8


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_bad_image(content):
    _decodes_or_is_bad(content)


SEEDS = [
    encoded(noise(24, 24), "JPEG"),
    encoded(noise(24, 24), "PNG"),
    encoded(noise(24, 24), "TIFF", compression="tiff_lzw"),
    encoded(noise(24, 24).quantize(16), "GIF"),
    encoded(noise(24, 24), "WEBP"),
    encoded(noise(24, 24), "AVIF"),
    encoded(noise(24, 24), "JPEG2000"),
    encoded(noise(24, 24), "ICO"),
    encoded(noise(24, 24), "TGA", compression="tga_rle"),
    encoded(noise(24, 24), "BMP"),
    encoded(noise(24, 24), "DDS"),
    encoded(noise(24, 24), "SGI"),
    encoded(noise(24, 24), "PCX"),
    encoded(Image.new("RGB", (24, 24)), "ICO", bitmap_format="bmp", sizes=[(16, 16)]),
    encoded(noise(24, 24), "PPM"),
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.integers(0, 2000),
)
def test_mutated_and_truncated_images_raise_nothing_but_bad_image(content, changes, cut):
    mutated = bytearray(content)
    for position, value in changes:
        mutated[position % len(mutated)] = value
    _decodes_or_is_bad(bytes(mutated[: len(mutated) - cut % len(mutated)]))


def _decodes_or_is_bad(content: bytes) -> None:
    try:
        image = decode_image(content, max_pixels=1_000_000)
    except BadImageError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert image.mode == "RGB"


def test_extensions_count_only_what_can_be_opened():
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tiff", ".gif", ".bmp", ".avif", ".mpo"} <= set(
        extensions
    )
    assert not {".pdf", ".eps", ".mpg", ".h5", ".txt", ".fits", ".qoi", ""} & set(extensions)
    assert "MPO" not in images.image_formats()


def test_preprocessing_survives_its_dictionary():
    assert Preprocessing.from_dict(IMAGENET.to_dict()) == IMAGENET


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"std": [0, 1, 1]}, {"mean": [1]}, {"interpolation": "box"}, {"extra": 1}],
    ids=str,
)
def test_damaged_preprocessing_is_refused(change):
    with pytest.raises(ClassifierError, match="preprocessing"):
        Preprocessing.from_dict({**IMAGENET.to_dict(), **change})


def test_another_input_size_keeps_the_crop_ratio():
    resized = Preprocessing(
        resize=256, size=224, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic"
    ).with_size(112)
    assert (resized.resize, resized.size, resized.interpolation) == (128, 112, "bicubic")


def test_a_disk_that_cannot_be_read_makes_no_bad_image(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "a.png").write_bytes(b"never read")
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(DiskError, match=r"Cannot read .*a.png: Input/output error"):
        decode_image(tmp_path / "a.png")
