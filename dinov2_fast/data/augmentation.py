"""Multi-crop augmentation: what is drawn (`CropDraw`) apart from how it is rendered.

Geometry and colour run in Pillow on 8-bit images, as in the code that trained the published
weights, and equal torchvision's operations on Pillow images bit for bit; only the dispatch around
them is gone, which costs more than the arithmetic at small crops. Blur, solarization and
normalisation run in NumPy, element by element, so that no thread count can change a bit.
"""

from __future__ import annotations

import math
from itertools import permutations
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2_fast.config import CropConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Per channel, for values in 0..1."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, for values in 0..1."""

BLUR_PROBABILITIES = {"official": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}
"""Of global crop 1, global crop 2 and the local crops. The published weights were trained with the
complements of the probabilities in the paper's tables; "official" is what took effect."""

BLUR_RADIUS = 4
"""The blur kernel is 9 pixels wide."""
_BLUR_SIGMA = (0.1, 2.0)
_ASPECT = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_MAX_ASPECT = 16
"""Of what the evaluation transform resizes; longer images are cut to their centre before."""
_JITTER_ORDERS = tuple(permutations(range(4)))

_SCALE = np.array([1 / (255 * std) for std in IMAGENET_STD], np.float32).reshape(3, 1, 1)
_SHIFT = np.array(
    [mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], np.float32
).reshape(3, 1, 1)


class Jitter(NamedTuple):
    """Colour jitter of one crop; a factor of `None` leaves its operation out."""

    order: tuple[int, ...]
    """In which 0 brightness, 1 contrast, 2 saturation and 3 hue follow each other."""
    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    """Shift as a share of the colour circle."""


class CropDraw(NamedTuple):
    """Everything random about one crop."""

    box: tuple[int, int, int, int]
    """Source pixels: left, top, right, bottom."""
    flip: bool
    jitter: Jitter | None
    gray: bool
    sigma: float | None
    """Blur in pixels of the crop."""
    solarize: bool


def draw_box(
    rng: Random, width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random rectangle: area a share of the image's, log of the aspect ratio uniform in 3/4..4/3.

    Args:
        rng: source of randomness.
        width: of the image in pixels.
        height: of the image in pixels.
        scale: smallest and largest share of the area.

    Returns:
        Left, top, right, bottom. After ten misfits the largest central rectangle with an allowed
        aspect ratio.

    Source: Szegedy et al., Going deeper with convolutions, 2015 (as in torchvision).
    """
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    for _ in range(_CROP_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.random() * (height - h + 1))
            left = int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _ASPECT[0]:
        h = round(width / _ASPECT[0])
    elif width / height > _ASPECT[1]:
        w = round(height * _ASPECT[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class MultiCrop:
    """Two global and some local crops of an image, each with its own colours.

    Order for every crop: resized crop, mirroring, colour jitter, grayscale, blur, then solarization
    for the second global crop only, normalisation. An instance is not to be shared by threads.

    Source: DINOv2, 2023; Caron et al., SwAV, 2020 (multi-crop); Grill et al., BYOL, 2020 (colours).
    """

    def __init__(self, crops: CropConfig, recipe: str = "official") -> None:
        """Takes the settings.

        Args:
            crops: sizes, scales and probabilities.
            recipe: decides the blur probabilities where `crops.blur` is "recipe".
        """
        blur = recipe if crops.blur == "recipe" else crops.blur
        if blur not in BLUR_PROBABILITIES:
            raise ValueError(
                f"MultiCrop: blur must be one of {', '.join(BLUR_PROBABILITIES)}, got {blur!r}"
            )
        if min(crops.global_px, crops.local_px) <= BLUR_RADIUS:
            raise ValueError(
                f"MultiCrop: crops must be larger than {BLUR_RADIUS} pixels, got "
                f"global_px {crops.global_px}, local_px {crops.local_px}"
            )
        self.crops = crops
        self.blur_probabilities = BLUR_PROBABILITIES[blur]
        self._renderers = {px: CropRenderer(px) for px in (crops.global_px, crops.local_px)}

    def __call__(self, image: Image.Image, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """The crops of an image.

        Args:
            image: mode RGB.
            seed: the crops are a pure function of the image and of this.

        Returns:
            Two global crops fp32 [3, H, W] and the local crops fp32 [3, h, w], normalised.
        """
        config = self.crops
        global_crops = torch.empty(2, 3, config.global_px, config.global_px)
        local_crops = torch.empty(config.num_local, 3, config.local_px, config.local_px)
        self.render_into(image, seed, list(global_crops.numpy()), list(local_crops.numpy()))
        return list(global_crops), list(local_crops)

    def render_into(
        self,
        image: Image.Image,
        seed: int,
        global_out: list[np.ndarray],
        local_out: list[np.ndarray],
    ) -> None:
        """The crops of an image, written into arrays such as rows of a batch.

        Args:
            image: mode RGB.
            seed: see `__call__`.
            global_out: two fp32 [3, H, W].
            local_out: one fp32 [3, h, w] per local crop.
        """
        outputs = [*global_out, *local_out]
        for draw, out in zip(self.draw(image.size, seed), outputs, strict=True):
            self._renderers[out.shape[-1]](image, draw, out)

    def draw(self, size: tuple[int, int], seed: int) -> list[CropDraw]:
        """What `__call__` does to an image of this size: two global draws, then the local ones.

        Args:
            size: of the image in pixels, (width, height).
            seed: see `__call__`.
        """
        rng, config = Random(seed), self.crops
        draws = [
            self._draw_crop(rng, size, config.global_scale, self.blur_probabilities[0], 0.0),
            self._draw_crop(
                rng,
                size,
                config.global_scale,
                self.blur_probabilities[1],
                config.solarize_probability,
            ),
        ]
        draws.extend(
            self._draw_crop(rng, size, config.local_scale, self.blur_probabilities[2], 0.0)
            for _ in range(config.num_local)
        )
        return draws

    def _draw_crop(
        self,
        rng: Random,
        size: tuple[int, int],
        scale: tuple[float, float],
        blur_probability: float,
        solarize_probability: float,
    ) -> CropDraw:
        config = self.crops
        return CropDraw(
            box=draw_box(rng, *size, scale),
            flip=rng.random() < config.horizontal_flip_probability,
            jitter=self._draw_jitter(rng)
            if rng.random() < config.color_jitter_probability
            else None,
            gray=rng.random() < config.grayscale_probability,
            sigma=_uniform(rng, *_BLUR_SIGMA) if rng.random() < blur_probability else None,
            solarize=rng.random() < solarize_probability,
        )

    def _draw_jitter(self, rng: Random) -> Jitter:
        config = self.crops
        order = _JITTER_ORDERS[int(rng.random() * len(_JITTER_ORDERS))]
        brightness, contrast, saturation = (
            _uniform(rng, max(0.0, 1 - strength), 1 + strength) if strength else None
            for strength in (config.brightness, config.contrast, config.saturation)
        )
        hue = _uniform(rng, -config.hue, config.hue) if config.hue else None
        return Jitter(order, brightness, contrast, saturation, hue)


def _uniform(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


class CropRenderer:
    """Renders drawn crops at one size; keeps its working memory between crops."""

    def __init__(self, crop_px: int) -> None:
        """Takes the side of the crops in pixels."""
        self._px = crop_px
        self._scratch: tuple[np.ndarray, ...] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Everything but the working memory."""
        return {"_px": self._px, "_scratch": None}

    def __call__(self, image: Image.Image, draw: CropDraw, out: np.ndarray) -> None:
        """One crop.

        Args:
            image: mode RGB.
            draw: what to do.
            out: fp32 [3, px, px], overwritten with the normalised crop.
        """
        px = self._px
        # Cropped first, so that the resampling filter sees no pixel outside of the box.
        crop = image.crop(draw.box).resize((px, px), Image.Resampling.BICUBIC)
        if draw.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw.jitter is not None:
            crop = jitter_colors(crop, draw.jitter)
        if draw.gray:
            crop = crop.convert("L")
        pixels = np.frombuffer(crop.tobytes(), np.uint8).reshape(px, px, -1).transpose(2, 0, 1)
        if draw.sigma is not None:
            pixels = self._blur(pixels, draw.sigma)
        if draw.solarize:  # inverts what is at least 128
            pixels = np.minimum(pixels, 255 - pixels)
        np.multiply(pixels, _SCALE, out=out)
        out -= _SHIFT

    def _blur(self, pixels: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur with reflected edges, rounded to whole levels.

        Args:
            pixels: uint8 [C, px, px].
            sigma: in pixels.

        Returns:
            fp32 [C, px, px]; valid until the next call.
        """
        px, radius = self._px, BLUR_RADIUS
        tail = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(1, radius + 1)]
        total = 1 + 2 * sum(tail)
        weights = [weight / total for weight in tail]
        if self._scratch is None:
            self._scratch = (
                np.empty((3, px + 2 * radius, px), np.float32),
                np.empty((3, px, px + 2 * radius), np.float32),
                np.empty((3, px, px), np.float32),
                np.empty((3, px, px), np.float32),
            )
        rows, columns, pair, blurred = (array[: len(pixels)] for array in self._scratch)
        end = px + radius
        rows[:, radius:end] = pixels
        rows[:, :radius] = rows[:, 2 * radius : radius : -1]
        rows[:, end:] = rows[:, end - 2 : end - 2 - radius : -1]
        np.multiply(rows[:, radius:end], np.float32(1 / total), out=blurred)
        for distance, weight in enumerate(weights, 1):
            above = rows[:, radius - distance : end - distance]
            np.add(above, rows[:, radius + distance : end + distance], out=pair)
            np.multiply(pair, np.float32(weight), out=pair)
            np.add(blurred, pair, out=blurred)
        columns[:, :, radius:end] = blurred
        columns[:, :, :radius] = columns[:, :, 2 * radius : radius : -1]
        columns[:, :, end:] = columns[:, :, end - 2 : end - 2 - radius : -1]
        np.multiply(columns[:, :, radius:end], np.float32(1 / total), out=blurred)
        for distance, weight in enumerate(weights, 1):
            left = columns[:, :, radius - distance : end - distance]
            np.add(left, columns[:, :, radius + distance : end + distance], out=pair)
            np.multiply(pair, np.float32(weight), out=pair)
            np.add(blurred, pair, out=blurred)
        return np.rint(blurred, out=blurred)


def jitter_colors(image: Image.Image, jitter: Jitter) -> Image.Image:
    """Brightness, contrast, saturation and hue in the drawn order.

    Args:
        image: mode RGB.
        jitter: order and factors.
    """
    for operation in jitter.order:
        if operation == 0 and jitter.brightness is not None:
            image = Image.blend(Image.new("RGB", image.size), image, jitter.brightness)
        elif operation == 1 and jitter.contrast is not None:
            gray = np.frombuffer(image.convert("L").tobytes(), np.uint8)
            mean = int(int(np.add.reduce(gray, dtype=np.int64)) / gray.size + 0.5)
            image = Image.blend(
                Image.new("RGB", image.size, (mean, mean, mean)), image, jitter.contrast
            )
        elif operation == 2 and jitter.saturation is not None:
            image = Image.blend(image.convert("L").convert("RGB"), image, jitter.saturation)
        elif operation == 3 and jitter.hue is not None:
            levels = np.frombuffer(bytearray(image.convert("HSV").tobytes()), np.uint8)
            levels[::3] += np.uint8(int(jitter.hue * 255) & 255)  # the circle wraps at 256
            image = Image.frombuffer("HSV", image.size, levels, "raw", "HSV", 0, 1).convert("RGB")
    return image


class EvaluationTransform:
    """Resize of the shorter side, centre crop, normalisation."""

    def __init__(self, image_px: int, resize_px: int) -> None:
        """Takes the side of the result and the length of the shorter side before cropping."""
        if not 1 <= image_px <= resize_px:
            raise ValueError(
                "evaluation_transform: expected 1 <= image_px <= resize_px, "
                f"got {image_px}, {resize_px}"
            )
        self.image_px = image_px
        self.resize_px = resize_px

    def __call__(self, image: Image.Image) -> Tensor:
        """fp32 [3, image_px, image_px], normalised, of an RGB image."""
        width, height = image.size
        shorter = min(width, height)
        longest = shorter * _MAX_ASPECT
        if (
            max(width, height) > longest
        ):  # resized as a whole, 1 x 20000 pixels would fill gigabytes
            left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
            width, height = image.size
        resized = (width * self.resize_px // shorter, height * self.resize_px // shorter)
        left, top = (round((side - self.image_px) / 2) for side in resized)
        crop = image.resize(resized, Image.Resampling.BICUBIC).crop(
            (left, top, left + self.image_px, top + self.image_px)
        )
        pixels = np.frombuffer(crop.tobytes(), np.uint8).reshape(self.image_px, self.image_px, 3)
        out = np.empty((3, self.image_px, self.image_px), np.float32)
        np.multiply(pixels.transpose(2, 0, 1), _SCALE, out=out)
        out -= _SHIFT
        return torch.from_numpy(out)


def evaluation_transform(image_px: int = 224, resize_px: int = 256) -> EvaluationTransform:
    """The transform of the k-NN and linear protocols: bicubic resize, centre crop, normalise.

    Args:
        image_px: side of the result.
        resize_px: length of the shorter side before cropping; at least `image_px`.
    """
    return EvaluationTransform(image_px, resize_px)
