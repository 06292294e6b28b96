"""Bytes -> pixels -> network input, the same in training and at the endpoint.

Pillow and numpy only: what the network saw in training is what the endpoint feeds it, because
there is one implementation. An image is read as a person sees it: rotated as its EXIF data says,
CMYK and palettes as RGB, 16 bits scaled to 8, transparency on white, an animation's first frame.
What is black and what is white is what the file declares, never the range of its own values: two
images of a data set, and a training image and a request, have the same scale.
"""

from __future__ import annotations

import ctypes
import errno
import io
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.IcoImagePlugin import IcoFile

from visiontuner.errors import BadImageError, BusyError, ClassifierError, DiskError, LargeImageError

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]

# Part of the names of all that is remembered about decoded images; raised whenever the same file
# becomes other pixels.
DECODING_VERSION = 2

# Twice Pillow's own warning level: above it Pillow refuses as well.
MAX_PIXELS = 178_956_970

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
# What Pillow decodes in C, in the order in which it is tried; MPO opens as JPEG, and ICO by
# `_open_icon`. Decoders in Python (FITS, QOI, ICNS, XPM, …) hold the interpreter: a FITS file of
# 200 kB holds a server for 20 s.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "DIB", "CUR", "PCX",
    "DCX", "DDS", "SGI", "SUN", "PSD", "TGA",
)  # fmt: skip
# Some of these formats have variants that are decoded in Python: run-length BMP, plain PPM, ….
_C_DECODERS = frozenset(
    {"raw", "zip", "jpeg", "gif", "libtiff", "jpeg2k", "bcn", "packbits", "pcx", "sgi_rle",
     "sun_rle", "tga_rle"}
)  # fmt: skip
# Pillow loops over the strips of an uncompressed TIFF in Python, about 5 microseconds each.
_MAX_TILES = 100_000
# Each scan of a JPEG passes over all of its pixels; progressive photographs have about 10.
_MAX_SCANS = 100
# Memory of decoding a pixel and converting it to RGB, measured; 8 for what is not named. libwebp
# holds several canvases, OpenJPEG 32 bits a component twice, libtiff a strip that may be all.
_BYTES_PER_PIXEL = {"WEBP": 20, "AVIF": 16, "HEIF": 16, "JPEG2000": 28, "TIFF": 16}
_OTHER_BYTES_PER_PIXEL = 8
_COEFFICIENT_BYTES = 6  # a JPEG of several scans is held whole, at any scale
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# After a scan's data: no stuffed zero, no restart and no fill byte.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_ICON_MAGIC = b"\0\0\1\0"
# 12 bits that no header declares, in a file of 16, use 17 of 256 levels.
_FEW_LEVELS = 20
_ORIENTATION_TAG = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A 1 x 100,000 image would need 16 GB once its shorter side is 232. What lies that far from the
# centre is cropped away anyway.
_MAX_ASPECT_RATIO = 100
# A conversion holds several copies of what it converts: of a strip, not of the whole image.
_STRIP_PIXELS = 1 << 20
_BITS_PER_SAMPLE_TAG, _PHOTOMETRIC_TAG = 258, 262  # TIFF
_WHITE_IS_ZERO = 0
# Resampling overshoots a little. Values farther from [black, white], as a share of it, say that the
# file means another scale.
_MAX_OVERSHOOT = 1.0
_PILLOW_MODULES = re.compile(r"PIL\.")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes network input; stored with every classifier.

    Args:
        resize: the shorter side after resizing, pixels.
        size: side of the square centre crop, pixels; the network's input.
        mean, std: per channel (red, green, blue), on values in [0, 1].
        interpolation: Pillow's filter for resizing.
    """

    resize: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation

    def __post_init__(self) -> None:
        if self.resize < 1 or self.size < 1:
            raise ValueError(f"resize and size must be >= 1, got {self.resize} and {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need 3 values, got {self.mean} and {self.std}")
        if not all(math.isfinite(v) for v in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean must be finite and std > 0, got {self.mean} and {self.std}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation must be one of {', '.join(_RESAMPLING)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        raw = asdict(self)
        return {**raw, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ClassifierError: a key is missing or unknown, or a value breaks a rule.
        """
        try:
            names = {field.name for field in fields(cls)}
            if set(raw) != names:
                raise ValueError(f"it must hold {', '.join(sorted(names))}, got {sorted(raw)}")
            return cls(
                resize=int(raw["resize"]),
                size=int(raw["size"]),
                mean=tuple(float(v) for v in raw["mean"]),  # type: ignore[arg-type]
                std=tuple(float(v) for v in raw["std"]),  # type: ignore[arg-type]
                interpolation=raw["interpolation"],
            )
        except (ValueError, TypeError) as error:
            raise ClassifierError(f"The preprocessing cannot be read: {error}.") from None

    def with_size(self, size: int) -> Preprocessing:
        """The same for another input size; the crop keeps its share of the image."""
        return Preprocessing(
            resize=max(size, round(size * self.resize / self.size)),
            size=size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
        )


class DecodingMemory:
    """What decoding for several requests at a time may hold: small images side by side, large
    ones one after the other.

    Args:
        small: bytes up to which an image is decoded beside any others.
        most: bytes; an image that needs more is refused.
        waiting: requests that may wait for their turn. More would take the threads that answer
            small ones.
    """

    def __init__(self, *, small: int, most: int, waiting: int) -> None:
        self.small, self.most, self.waiting = small, most, waiting
        self._turn = threading.Lock()
        self._asked = threading.BoundedSemaphore(waiting + 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Until it ends, no other large image is decoded.

        Raises:
            BusyError: too many wait already.
        """
        if not self._asked.acquire(blocking=False):
            raise BusyError("Other large images are being decoded; send it again in some seconds.")
        try:
            with self._turn:
                yield
        finally:
            if (trim := _malloc_trim()) is not None:
                trim(0)
            self._asked.release()


@cache
def _malloc_trim() -> Callable[[int], object] | None:
    """glibc's function that gives free memory back to the system."""
    try:
        return cast(Callable[[int], object], ctypes.CDLL(None).malloc_trim)
    except (OSError, AttributeError):  # not glibc
        return None


def read_pixels(
    source: bytes | Path,
    preprocessing: Preprocessing,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
) -> NDArray[np.uint8]:
    """Decode and crop one image.

    Returns:
        uint8, shape (size, size, 3).

    Raises:
        BadImageError: as `decode_image`.
    """
    image = decode_image(
        source, target=preprocessing.resize, max_pixels=max_pixels, max_bytes=max_bytes
    )
    return crop_pixels(image, preprocessing)


def decode_image(
    source: bytes | Path,
    *,
    target: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
) -> Image.Image:
    """One image in RGB, as a person sees it.

    Args:
        source: the file's content, or its path.
        target: the shorter side that is wanted, pixels. A JPEG may then be decoded smaller (never
            below twice the target), which is several times faster for photographs.
        max_pixels: larger images are refused from their header, before any decoding.
        max_bytes: so are those whose decoding needs more memory.

    Raises:
        BadImageError: the source is empty, unreadable, truncated, too large, not an image, or one
            that Pillow decodes in Python.
        DiskError: the disk gives an I/O error.
        LargeImageError: decoding it needs more than `max_bytes`.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        whole = image.width * image.height
        if target is not None and image.format in ("JPEG", "MPO"):
            # The scale is 1/2, 1/4 or 1/8, never below the size given.
            image.draft(None, (2 * target, 2 * target))
        if max_bytes is not None and (needed := _decoding_bytes(image, whole, source)) > max_bytes:
            raise LargeImageError(
                f"its {image.width} x {image.height} pixels need {needed / 1e6:,.0f} MB as "
                f"{image.format}, more than the {max_bytes / 1e6:,.0f} MB allowed."
            )
        tags = dict(getattr(image, "tag_v2", ()))  # a TIFF's
        image.load()
        _check_size(image, max_pixels)
        black, white = _black_and_white(image, source, tags)
        return _to_rgb(_upright(image), black, white)


@contextmanager
def open_image(source: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image by its header, while the `with` block lasts; `load` decodes it.

    Raises:
        BadImageError: as `decode_image`; also for what is raised in the block.
    """
    _silence_pillow()
    name = str(source) if isinstance(source, Path) else f"an image of {len(source):,} bytes"
    try:
        with _open(source, max_pixels) as image:
            _check_size(image, max_pixels)
            _check_decoders(image)
            if image.format in ("JPEG", "MPO"):
                _check_scans(source)
            yield image
    except BadImageError as error:
        raise type(error)(f"Cannot read {name}: {error}") from None
    except Image.DecompressionBombError:
        raise BadImageError(
            f"Cannot read {name}: it has more than the {max_pixels:,} pixels allowed."
        ) from None
    except UnidentifiedImageError:
        raise BadImageError(f"Cannot read {name}: {_not_opened(source)}.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            # The image may be sound: it must not be left out for good.
            raise DiskError(
                f"Cannot read {name}: {error.strerror}. Check the disk, then start again."
            ) from None
        # Pillow's decoders answer hostile bytes with nearly every exception class there is.
        raise BadImageError(f"Cannot read {name}: {_reason(error)}.") from None


def crop_pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side and take the centre, as torchvision does on Pillow images.

    Equal to torchvision's `Resize(resize)` and `CenterCrop(size)` level by level, zero padding of
    images smaller than the crop included. (More than 100 times as long as wide, the ends are cut
    off first.)

    Args:
        image: mode RGB.

    Returns:
        uint8, shape (size, size, 3), C-contiguous.
    """
    image = _limit_aspect_ratio(image)
    width, height = image.size
    short = preprocessing.resize
    long = int(short * max(width, height) / min(width, height))
    image = image.resize(
        (short, long) if width <= height else (long, short),
        _RESAMPLING[preprocessing.interpolation],
    )
    size = preprocessing.size
    left, top = _crop_offset(image.width, size), _crop_offset(image.height, size)
    # Pillow fills what lies outside the image with zeros.
    return np.array(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def has_few_levels(image: Image.Image | NDArray[np.uint8]) -> bool:
    """Whether an image (RGB, or its pixels) is nearly black, white or of one shade of gray."""
    if isinstance(image, Image.Image):
        ranges = cast(tuple[tuple[int, int], ...], image.getextrema())
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    else:
        low, high = int(image.min()), int(image.max())
    return high - low < _FEW_LEVELS


def normalise(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Network input from pixels: (value / 255 - mean) / std.

    Args:
        pixels: uint8, shape (B, H, W, 3).

    Returns:
        float32, shape (B, 3, H, W), C-contiguous; equal to torchvision's `ToTensor`, `Normalize`.
    """
    # 256 levels and 3 channels: look the results up, twice as fast as computing them.
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    images = np.empty(planes.shape, dtype=np.float32)
    for channel in range(3):
        mean, std = np.float32(preprocessing.mean[channel]), np.float32(preprocessing.std[channel])
        images[:, channel] = ((levels - mean) / std)[planes[:, channel]]
    return images


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it opens here, in the order in which they are tried."""
    Image.init()
    with suppress(ImportError):  # whoever has HEIC photographs installs it
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in (*_FORMATS, "HEIF") if name in Image.OPEN)


@cache
def image_extensions() -> Mapping[str, str]:
    """File name endings that count as images, lower case, to Pillow's format name."""
    known = {*image_formats(), "ICO", "MPO"}
    return {end: name for end, name in Image.registered_extensions().items() if name in known}


def _silence_pillow() -> None:
    # catch_warnings is not safe in threads; one narrow filter that stays is.
    entry = ("ignore", None, Warning, _PILLOW_MODULES, 0)
    if entry not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)


def _open(source: bytes | Path, max_pixels: int) -> Image.Image:
    if isinstance(source, Path):
        if source.stat().st_size == 0:
            raise BadImageError("the file is empty.")
    elif not source:
        raise BadImageError("it is empty.")
    if _start_of(source).startswith(_ICON_MAGIC):
        return _open_icon(_content(source), max_pixels)
    stream = source if isinstance(source, Path) else io.BytesIO(source)
    return Image.open(stream, formats=image_formats())


def _open_icon(content: bytes, max_pixels: int) -> Image.Image:
    """The largest image of an icon file; Pillow's opener decodes it before it can be checked."""
    icon = IcoFile(io.BytesIO(content))
    inner = io.BytesIO(content[icon.entry[0].offset :])
    with Image.open(inner, formats=("PNG", "DIB")) as header:
        _check_size(header, max_pixels)
        _check_decoders(header)
    image = icon.frame(0)
    image.format = "ICO"
    return image


def _start_of(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:16]
    with source.open("rb") as file:
        return file.read(16)


def _content(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _not_opened(source: bytes | Path) -> str:
    """Why Pillow does not know an image: of its other formats, the one whose mark it bears."""
    start = _start_of(source)
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS and "HEIF" not in image_formats():
        return "HEIC images are not decoded: install pillow-heif, or convert to JPEG"
    for name in reversed(Image.ID):  # XPM before XBM, which takes any comment for its own
        if name in (*image_formats(), "ICO") or name not in Image.OPEN:
            continue
        accept = Image.OPEN[name][1]
        with suppress(Exception):  # they index into what may be shorter
            if accept is not None and accept(start):
                return f"{name} images are not decoded: convert to PNG"
    return "it is not an image that Pillow knows"


def _check_decoders(image: Image.Image) -> None:
    tiles = getattr(image, "tile", ())  # WebP and AVIF have theirs once they are loaded
    if len(tiles) > _MAX_TILES:
        raise BadImageError(f"it has {len(tiles):,} strips, more than the {_MAX_TILES:,} allowed.")
    for decoder in {tile[0] for tile in tiles} - _C_DECODERS:
        raise BadImageError(
            f"{image.format} images of this kind ({decoder}) are not decoded: convert to PNG."
        )


def _decoding_bytes(image: Image.Image, whole: int, source: bytes | Path) -> int:
    """About what decoding an image will hold, `whole` pixels in its file."""
    each = _BYTES_PER_PIXEL.get(image.format or "", _OTHER_BYTES_PER_PIXEL)
    needed = image.width * image.height * each
    if image.format in ("JPEG", "MPO") and _count_scans(_content(source)) > 1:
        needed += whole * _COEFFICIENT_BYTES
    return needed


def _check_scans(source: bytes | Path) -> None:
    content = _content(source)
    # Data and embedded thumbnails may hold the two bytes as well: the truth is counted if needed.
    if content.count(bytes((0xFF, _START_OF_SCAN))) > _MAX_SCANS < _count_scans(content):
        raise BadImageError(f"it has more than the {_MAX_SCANS} scans allowed: save it again.")


def _count_scans(content: bytes) -> int:
    """How many scans a JPEG file has, up to one more than are allowed."""
    scans, position = 0, 2
    while scans <= _MAX_SCANS:
        found = _NEXT_MARKER.search(content, position)
        if found is None or content[found.start() + 1] == _END_OF_IMAGE:
            break
        position = found.start() + 2
        scans += content[position - 1] == _START_OF_SCAN
        position += int.from_bytes(content[position : position + 2], "big")
    return scans


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImageError(f"it has no pixels ({width} x {height}).")
    if width * height > max_pixels:
        raise BadImageError(
            f"its {width} x {height} pixels are more than the {max_pixels:,} allowed."
        )


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF data, which fails where other tags are damaged.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
        method = _TRANSPOSED.get(orientation)  # type: ignore[arg-type]
    except Exception:  # damaged EXIF data: every viewer shows the image as it is stored
        return image
    return image if method is None else image.transpose(method)


def _black_and_white(
    image: Image.Image, source: bytes | Path, tags: Mapping[int, Any]
) -> tuple[float, float]:
    """Which values of an image with more than 8 bits are black and white, as the file declares.

    A float is 0 to 1, and a whole number of 32 bits 0 to 65,535: they declare no depth.
    """
    if image.mode == "F":
        white = 1
    elif bits := tags.get(_BITS_PER_SAMPLE_TAG):
        signed = image.mode == "I"
        white = (1 << min(bits[0], 16) - (signed and bits[0] <= 16)) - 1
    elif image.mode == "I;16" and image.format == "PNG":
        white = (1 << _significant_bits(image, _content(source))) - 1
    else:
        white = 65535
    return (white, 0) if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO else (0, white)


def _significant_bits(image: Image.Image, png: bytes) -> int:
    """How many of the 16 bits of a grayscale PNG hold its values.

    The sBIT chunk says so. The PNG specification wants such values scaled up to 16 bits, and some
    programs write them as they are: then some of the bits below the scaled ones are set.
    """
    position, kind = 8, png[12:16]
    while kind not in (b"sBIT", b"IDAT", b""):
        position += 12 + int.from_bytes(png[position : position + 4], "big")
        kind = png[position + 4 : position + 8]
    bits = png[position + 8] if kind == b"sBIT" else 16
    if not 8 < bits < 16 or cast(tuple[int, int], image.getextrema())[1] >> bits:
        return 16
    below = (1 << 16 - bits) - 1
    as_they_are = any((np.asarray(strip) & below).any() for _, strip in _strips(image))
    return bits if as_they_are else 16


def _to_rgb(image: Image.Image, black: float, white: float) -> Image.Image:
    """RGB, on white; `black` and `white` are the values of an image with more than 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _in_strips(image, lambda strip: _to_8_bits(strip, black, white))
    if image.has_transparency_data:
        # Programs that know no alpha leave it 0: nothing would be seen of the image.
        seen = any(_with_alpha(strip).getchannel("A").getbbox() for _, strip in _strips(image))
        return _in_strips(image, _on_white if seen else lambda strip: _with_alpha(strip))
    if image.mode == "RGB":
        return image
    return _in_strips(image, lambda strip: strip)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Strips of whole rows, each with the row at which it begins."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip).convert("RGB"), (0, top))
    return rgb


def _with_alpha(image: Image.Image) -> Image.Image:
    # Pillow converts premultiplied gray only to LA.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), _with_alpha(image))


def _to_8_bits(image: Image.Image, black: float, white: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    shares = (values - black) / (white - black)
    if shares.min() < -_MAX_OVERSHOOT or shares.max() > 1 + _MAX_OVERSHOOT:
        low, high = sorted((black, white))
        raise BadImageError(
            f"it has values from {values.min():g} to {values.max():g}, and {low:g} to {high:g} is "
            "read: convert it to 8 or 16 bits."
        )
    return Image.fromarray(np.rint(shares * 255).clip(0, 255).astype(np.uint8))


def _limit_aspect_ratio(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = _MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def _crop_offset(length: int, size: int) -> int:
    if length < size:
        return -((size - length) // 2)
    return round((length - size) / 2.0)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".")
    return text or f"it is damaged ({type(error).__name__})"
