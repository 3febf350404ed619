from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinov2_fast.data.decoding import UnreadableImage, decode_image
from tests.data.pictures import encoded, picture

ALL_FORMATS = {
    "jpeg": ("JPEG", {"quality": 95}),
    "progressive": ("JPEG", {"progressive": True, "quality": 95}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 95}),
    "webp_lossless": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff_lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
}
LOSSLESS = ("png", "webp_lossless", "tiff", "tiff_lzw", "bmp")


def mean_difference(image: Image.Image, expected: Image.Image) -> float:
    assert image.mode == "RGB"
    assert image.size == expected.size
    return float(np.abs(np.asarray(image, np.float64) - np.asarray(expected, np.float64)).mean())


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_format_gives_the_picture_back(name):
    kind, options = ALL_FORMATS[name]
    difference = mean_difference(decode_image(encoded(picture(), kind, **options)), picture())
    assert difference == 0 if name in LOSSLESS else difference < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(picture(), "PNG", exif=exif))))
    stored = decode_image(encoded(picture(), kind, exif=exif))
    assert stored.size == ((40, 30) if orientation < 5 else (30, 40))
    assert mean_difference(stored, upright.convert("RGB")) < 8


def test_the_eight_orientations_are_eight_different_pictures():
    exif = Image.Exif()
    seen = set()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        seen.add(decode_image(encoded(picture(), "PNG", exif=exif)).tobytes())
    assert len(seen) == 8


def test_damaged_exif_does_not_make_an_image_unreadable():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff\xff\xff")
    assert decode_image(data).size == (40, 30)


def test_cmyk_becomes_rgb():
    cmyk = picture().convert("CMYK")
    assert mean_difference(decode_image(encoded(cmyk, "JPEG", quality=95)), picture()) < 6


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_become_their_colors(kind):
    palette = picture().quantize(64)
    assert mean_difference(decode_image(encoded(palette, kind)), palette.convert("RGB")) == 0


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray_and_bilevel_become_equal_channels(kind, mode):
    if mode == "1" and kind in ("JPEG", "WEBP"):
        mode = "L"  # these two have no bilevel mode
    pixels = np.asarray(decode_image(encoded(picture().convert(mode), kind)), np.int64)
    assert np.abs(pixels - pixels[:, :, :1]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(kind):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 255, 128)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = np.asarray(decode_image(encoded(image, kind, **options)))[0].tolist()
    assert pixels == [[255, 255, 255], [255, 0, 0], [127, 127, 255]]


def test_gray_with_alpha_and_transparent_palette_entries_are_composited_on_white():
    gray = Image.new("LA", (2, 1))
    gray.putdata([(0, 0), (40, 255)])
    assert np.asarray(decode_image(encoded(gray, "PNG")))[0, :, 0].tolist() == [255, 40]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        pixels = np.asarray(decode_image(encoded(palette, kind, transparency=0)))[0].tolist()
        assert pixels == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    levels = np.array([[0, 257, 32768, 65278, 65535]], np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(levels), kind)))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 254, 255]


def test_twelve_bit_tiffs_use_their_own_white_level():
    # One row of 0, 2048, 4095, 0 packed as 12 bits; Pillow cannot write this either.
    strip = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (279, 6)]
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    data = b"II*\0" + struct.pack("<I", 14) + strip + struct.pack("<H", len(entries)) + directory
    assert np.asarray(decode_image(data + bytes(4)))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_sixteen_bit_rgb_is_scaled():
    # Pillow cannot write 16-bit RGB; a PNG is a signature and chunks.
    levels = np.array([[[0, 32896, 65535]]], ">u2")
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = png(
        (b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + levels.tobytes())), (b"IEND", b"")
    )
    assert np.asarray(decode_image(data))[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_levels_without_a_white_point_are_stretched(dtype):
    levels = np.array([[-5, 0, 95]], dtype)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(levels), "TIFF")))
    assert pixels[0, :, 0].tolist() == [0, 13, 255]  # 255 * 5 / 100 rounds to 13


def test_constant_and_non_finite_levels_are_defined():
    constant = Image.fromarray(np.full((2, 2), 7, np.float32))
    assert np.asarray(decode_image(encoded(constant, "TIFF"))).max() == 0
    # NaN is black, an infinity the end of the scale that it lies beyond.
    broken = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 4.0, 2.0, 3.0]], np.float32))
    pixels = np.asarray(decode_image(encoded(broken, "TIFF")))
    assert pixels[0, :, 0].tolist() == [0, 255, 0, 255, 0, 128]
    with pytest.raises(UnreadableImage, match="finite"):
        decode_image(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


def test_sixteen_bits_taller_than_a_strip_equal_their_rounded_levels():
    levels = np.random.default_rng(0).integers(0, 65536, (131, 3)).astype(np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(levels), "PNG")))[:, :, 0]
    assert np.array_equal(pixels, np.rint(levels / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind):
    red, green = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), (0, 255, 0))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(red, kind, save_all=True, append_images=[green], **options)
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_decode(size):
    assert decode_image(encoded(Image.new("RGB", size, "red"), "PNG")).size == size


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_truncation_at_every_twentieth_is_unreadable(name):
    kind, options = ALL_FORMATS[name]
    data = encoded(picture(), kind, **options)
    # A PNG may lose its last chunk, which holds no pixels.
    last = 90 if kind == "PNG" else 95
    for percent in range(0, last + 1, 5):
        with pytest.raises(UnreadableImage):
            decode_image(data[: len(data) * percent // 100])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
)
def test_what_is_no_image_is_unreadable_with_a_stable_reason(data):
    with pytest.raises(UnreadableImage) as first:
        decode_image(data)
    with pytest.raises(UnreadableImage) as second:
        decode_image(data)
    assert str(first.value) == str(second.value) != ""
    assert "0x" not in str(first.value)


def test_two_thousand_mutated_images_never_crash():
    rng = np.random.default_rng(0)
    corpus = [encoded(picture(), kind, **options) for kind, options in ALL_FORMATS.values()]
    corpus += [encoded(picture().quantize(64), kind) for kind in ("PNG", "GIF", "TIFF")]
    corpus += [encoded(picture().convert("CMYK"), "JPEG")]
    outcomes = {True: 0, False: 0}
    for trial in range(2400):
        data = bytearray(corpus[trial % len(corpus)])
        # Headers decide which code runs: half of the mutations stay in the first 64 bytes.
        reach = min(64, len(data)) if trial // len(corpus) % 2 else len(data)
        for _ in range(int(rng.integers(1, 9))):
            data[int(rng.integers(reach))] = int(rng.integers(256))
        if rng.random() < 0.1:
            del data[int(rng.integers(len(data))) :]
        try:
            image = decode_image(bytes(data), max_pixels=1_000_000)
        except UnreadableImage:
            outcomes[False] += 1
        else:
            assert image.mode == "RGB"
            outcomes[True] += 1
    assert min(outcomes.values()) > 200, outcomes


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bomb_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))


def test_a_decompression_bomb_is_refused_before_its_pixels_are_allocated():
    # 30000^2 pixels would take 2.7 GB; 13000^2 lies below Pillow's own limit, above ours.
    script = """
import resource, sys
from dinov2_fast.data.decoding import UnreadableImage, decode_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode_image(sys.stdin.buffer.read(int(sys.argv[1])))
before = peak()
for size, limit in ((int(sys.argv[2]), 178_956_970), (int(sys.argv[3]), 100_000_000)):
    try:
        decode_image(sys.stdin.buffer.read(size), max_pixels=limit)
    except UnreadableImage as error:
        assert "pixels" in str(error), error
    else:
        raise SystemExit("decoded")
print(peak() - before)
"""
    images = encoded(picture(), "PNG"), bomb_png(30000), bomb_png(13000)
    done = subprocess.run(
        [sys.executable, "-c", script, *(str(len(image)) for image in images)],
        input=b"".join(images),
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 50_000  # KiB


def test_max_pixels_is_a_limit_on_the_product_of_the_sides():
    data = encoded(picture(40, 30), "BMP")
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(UnreadableImage, match="40 x 30"):
        decode_image(data, max_pixels=1199)


@pytest.mark.parametrize(
    ("min_side", "size"),
    [(None, (800, 600)), (301, (800, 600)), (300, (400, 300)), (150, (200, 150)), (1, (100, 75))],
)
def test_large_jpegs_shrink_only_as_far_as_allowed(min_side, size):
    data = encoded(picture(800, 600), "JPEG")
    assert decode_image(data, min_side=min_side).size == size


def test_min_side_leaves_other_formats_alone():
    assert decode_image(encoded(picture(800, 600), "PNG"), min_side=1).size == (800, 600)


def test_warnings_of_the_decoder_neither_escape_nor_change_the_filters():
    damaged = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    before = list(warnings.filters)
    failures = []

    def work():
        try:
            for _ in range(50):
                decode_image(damaged)
        except UnreadableImage as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(warnings.filters) == before
