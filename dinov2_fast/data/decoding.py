"""Encoded bytes to an 8-bit RGB image, on the assumption that the bytes are hostile.

What a viewer would show is what training sees: EXIF orientation is applied, transparent pixels
are composited on white, palettes, CMYK and grayscale become RGB, 16 bits are scaled (not clipped)
to 8, and of an animation the first frame counts. 32-bit and floating-point gray images have no
white level of their own, so their range is stretched. Colour profiles are ignored, as is common.
"""

from __future__ import annotations

import io
import threading
import warnings
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Pixels an image may announce; more also needs a higher `PIL.Image.MAX_IMAGE_PIXELS`."""

# An allow-list: Pillow's other plugins include ones that start external programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
)

MAX_FILE_BYTES = 1 << 30
"""Encoded images above this size are not read."""

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_STRIP_ROWS = 64
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _SilentPillow:
    """Hides Pillow's warnings (damaged metadata, large sizes) while any thread decodes.

    `warnings.catch_warnings` in several threads can leave its filters behind; counting the threads
    and restoring once does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._filters.__exit__(None, None, None)


_silent_pillow = _SilentPillow()


class UnreadableImage(ValueError):
    """An image that cannot be read or decoded; the message is the reason."""


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> Image.Image:
    """The first frame of an encoded image as an upright 8-bit RGB image.

    Args:
        data: the bytes of a JPEG, PNG, WebP, TIFF, BMP or GIF file; no name decides, but content.
        max_pixels: images whose header announces more are refused before pixels are allocated.
        min_side: lets libjpeg decode JPEGs at 1/2, 1/4 or 1/8 while both sides of the result stay
            at least this many pixels; `None` always decodes in full. The header alone decides.

    Raises:
        UnreadableImage: for whatever is wrong with the bytes; nothing else is raised.
    """
    if not data:
        raise UnreadableImage("empty file")
    try:
        with _silent_pillow:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(
                    f"header announces {width} x {height} pixels, more than max_pixels {max_pixels}"
                )
            if min_side is not None and image.format in ("JPEG", "MPO"):
                shrink = max(min(width, height) // min_side, 1)
                image.draft(None, (width // shrink, height // shrink))
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
            transpose = _TRANSPOSE_OF_ORIENTATION.get(orientation)
            return rgb if transpose is None else rgb.transpose(transpose)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:  # its own message holds an address, another one every time
        raise UnreadableImage(f"not one of the formats {', '.join(FORMATS)}") from None
    # Decoders raise anything on hostile bytes: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}"[:300]) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 when absent or when the metadata is damaged."""
    if image.format == "TIFF":  # Pillow turns TIFF images upright while loading
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata does not make the pixels unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """The loaded image in mode RGB."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _from_levels(np.asarray(image), white=_white_level(image))
    if mode in ("I", "F"):
        return _from_levels(np.asarray(image), white=65535 if image.format == "PNG" else None)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, "white")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return image if mode == "RGB" else image.convert("RGB")


def _white_level(image: Image.Image) -> int:
    """Largest value of a 16-bit gray image; TIFF also stores 12 bits this way."""
    bits = 16
    if image.format == "TIFF":
        bits = int(cast("tuple[int, ...]", image.tag_v2.get(_BITS_PER_SAMPLE_TAG, (16,)))[0])  # type: ignore[attr-defined]
    return (1 << bits) - 1


def _from_levels(levels: np.ndarray, *, white: int | None) -> Image.Image:
    """Gray levels [H, W] as 8-bit RGB; without a white level their own range is stretched."""
    low, high = (0, white) if white is not None else _finite_range(levels)
    scale = 255.0 / (high - low) if high > low else 0.0
    gray = np.empty(levels.shape, np.uint8)
    for top in range(0, len(levels), _STRIP_ROWS):  # wide types only for a strip at a time
        strip = np.clip(levels[top : top + _STRIP_ROWS].astype(np.float64), low, high)
        gray[top : top + _STRIP_ROWS] = np.rint((np.nan_to_num(strip, nan=low) - low) * scale)
    return Image.fromarray(gray).convert("RGB")


def _finite_range(levels: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite level."""
    low, high = np.inf, -np.inf
    for top in range(0, len(levels), _STRIP_ROWS):
        strip = levels[top : top + _STRIP_ROWS]
        finite = strip[np.isfinite(strip)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise UnreadableImage("no finite level")
    return low, high
