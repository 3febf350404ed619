"""Builds the batch of a step from nothing but the step's number."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from dinov2_fast.config import CropConfig, MaskConfig
from dinov2_fast.data.augmentation import MultiCrop
from dinov2_fast.data.collate import Batch, Unreadable, index_masks
from dinov2_fast.data.decoding import UnreadableImage, decode_image
from dinov2_fast.data.image_source import ImageSource, printable
from dinov2_fast.data.masking import BlockMasks
from dinov2_fast.data.sampler import batch_positions, sample_index
from dinov2_fast.data.seeding import CROPS, MASKS, SUBSTITUTE, derive_seed
from dinov2_fast.errors import DataError, UserError

_RANDOM_SUBSTITUTES = 8
_MAX_SUBSTITUTES = 1000

_MIN_OVERSAMPLING = 4
"""JPEGs are decoded at reduced size only while every crop still shrinks by at least this factor."""


def substitute_indices(seed: int, position: int, num_images: int) -> Iterator[int]:
    """The images tried instead of an unreadable one, in order; a pure function of the position.

    First random ones, so that neighbours in a damaged file do not stand in for each other, then,
    for data with few readable images, all others one after the other.
    """
    index = 0
    for attempt in range(_RANDOM_SUBSTITUTES):
        index = derive_seed(seed, SUBSTITUTE, position, attempt) % num_images
        yield index
    for attempt in range(1, min(num_images, _MAX_SUBSTITUTES)):
        yield (index + attempt) % num_images


class Failure(NamedTuple):
    """An exception of a worker as text: raised again in the main process, where it can be shown."""

    message: str
    error: type[UserError] | None
    """What to raise it as; None for a bug."""


class BatchBuilder(Dataset):
    """Builds the batch of any step from nothing but its number; runs inside the workers."""

    def __init__(
        self,
        source: ImageSource,
        *,
        crops: CropConfig,
        masks: MaskConfig,
        patch_size: int,
        recipe: str,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        max_pixels: int,
    ) -> None:
        """See `TrainingLoader`."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "TrainingLoader: expected batch_size >= 1 and 0 <= rank < world_size, got "
                f"{batch_size}, {rank}, {world_size}"
            )
        for name, px in (("global_px", crops.global_px), ("local_px", crops.local_px)):
            if px % patch_size:
                raise ValueError(
                    f"TrainingLoader: {name} must be a multiple of the patch size {patch_size}, "
                    f"got {px}"
                )
        self._source = source
        self._crops = crops
        self._seed = seed
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._max_pixels = max_pixels
        self._multi_crop = MultiCrop(crops, recipe)
        side = crops.global_px // patch_size
        self._masks = BlockMasks(
            (side, side),
            num_crops=2 * batch_size,
            probability=masks.probability,
            min_ratio=masks.min_ratio,
            max_ratio=masks.max_ratio,
        )
        # The shorter side of a crop is at least sqrt(3/4 * scale) of the image's shorter side.
        self._min_side = math.ceil(
            _MIN_OVERSAMPLING
            * max(
                px / math.sqrt(0.75 * max(scale[0], 1e-4))
                for px, scale in (
                    (crops.global_px, crops.global_scale),
                    (crops.local_px, crops.local_scale),
                )
            )
        )

    def __getitem__(self, step: int) -> Batch | Failure:
        """The batch of a step; never raises, so that what does come out of a loader is its own."""
        try:
            return self.build(step)
        except DataError as error:
            return Failure(str(error), DataError)
        except Exception:
            return Failure(traceback.format_exc(), None)

    def build(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            DataError: an image is unreadable and so are all its substitutes.
        """
        crops, batch_size = self._crops, self._batch_size
        global_crops = torch.empty(2, batch_size, 3, crops.global_px, crops.global_px)
        local_crops = torch.empty(crops.num_local, batch_size, 3, crops.local_px, crops.local_px)
        global_arrays, local_arrays = global_crops.numpy(), local_crops.numpy()
        indices, unreadable = [], []
        positions = batch_positions(
            step, batch_size=batch_size, rank=self._rank, world_size=self._world_size
        )
        for row, position in enumerate(positions):
            index, image = self._readable_image(position, unreadable)
            indices.append(index)
            self._multi_crop.render_into(
                image,
                derive_seed(self._seed, CROPS, position),
                list(global_arrays[:, row]),
                list(local_arrays[:, row]),
            )
        masks = self._masks(derive_seed(self._seed, MASKS, step, self._rank))
        mask_indices, mask_weights, num_masked = index_masks(
            masks, upper_bound=self._masks.upper_bound
        )
        return Batch(
            global_crops=global_crops.flatten(0, 1),
            local_crops=local_crops.flatten(0, 1),
            masks=masks,
            mask_indices=mask_indices,
            mask_weights=mask_weights,
            sample_indices=torch.tensor(indices),
            num_masked=num_masked,
            step=step,
            unreadable=tuple(unreadable),
        )

    def _readable_image(
        self, position: int, unreadable: list[Unreadable]
    ) -> tuple[int, Image.Image]:
        """Index and pixels of the image at a position, or of the first readable substitute."""
        source, seen = self._source, set()
        drawn = sample_index(self._seed, position, len(source))
        index, reason = drawn, ""
        for index in (drawn, *substitute_indices(self._seed, position, len(source))):
            if index in seen:
                continue
            seen.add(index)
            try:
                image = decode_image(
                    source.read(index), max_pixels=self._max_pixels, min_side=self._min_side
                )
            except UnreadableImage as error:
                reason = str(error)[:300]
                unreadable.append(
                    Unreadable(index, source.name(index), source.offset(index), reason)
                )
            else:
                return index, image
        raise DataError(
            f"data: {printable(source.name(drawn))} and the {len(seen) - 1} images tried in its "
            f"place are all unreadable; the last, {printable(source.name(index))}: "
            f"{printable(reason)}"
        )
