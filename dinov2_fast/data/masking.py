"""Block masks over the patches of the global crops."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import numpy as np
import torch

_MIN_BLOCK_PATCHES = 4
_LOG_ASPECT = math.log(1 / 0.3)
_TRIES_PER_BLOCK = 10


class BlockMasks:
    """Draws the masks of a batch: rectangles of patches, more in some crops than in others.

    Of 2B crops, int(2B * probability) are masked. Their mask ratios are stratified: the range
    min_ratio..max_ratio is cut into as many equal parts as there are masked crops, and crop i draws
    uniformly from part i. The list of masks is then shuffled over the crops.

    Source: Bao et al., BEiT, 2021 (blocks); DINOv2, 2023 (stratified ratios).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        num_crops: int,
        probability: float = 0.5,
        min_ratio: float = 0.1,
        max_ratio: float = 0.5,
    ) -> None:
        """Fixes everything that does not depend on the step.

        Args:
            grid: patches of a crop, (rows, columns).
            num_crops: 2B, global crops of the local batch.
            probability: share of the crops that are masked.
            min_ratio: smallest share of masked patches in a masked crop.
            max_ratio: largest share of masked patches in a masked crop.
        """
        if min(grid) < 1 or num_crops < 1:
            raise ValueError(
                f"BlockMasks: grid and num_crops must be positive, got {grid}, {num_crops}"
            )
        if not 0 <= probability <= 1 or not 0 <= min_ratio <= max_ratio <= 1:
            raise ValueError(
                "BlockMasks: expected 0 <= probability <= 1 and 0 <= min_ratio <= max_ratio <= 1, "
                f"got {probability}, {min_ratio}, {max_ratio}"
            )
        self.grid = grid
        self.num_crops = num_crops
        self.num_masked_crops = int(num_crops * probability)
        # fp32, because whether int(N * edge) rounds down to one number or the other depends on it.
        self._edges = torch.linspace(min_ratio, max_ratio, self.num_masked_crops + 1)
        # floor(floor(H_px / 2 / p) * W_px / p): 128 patches at 224 / 14, 666 at 518 / 14.
        self._max_block = (grid[0] // 2) * grid[1]

    @property
    def num_patches(self) -> int:
        """N, patches of a crop."""
        return self.grid[0] * self.grid[1]

    @property
    def upper_bound(self) -> int:
        """Masked patches of a batch never exceed this constant, which buffers are padded to."""
        return int((self.num_patches * self._edges[1:]).int().sum())

    def __call__(self, seed: int) -> torch.Tensor:
        """The masks of a batch.

        Args:
            seed: derived from the run's seed, the step and the rank.

        Returns:
            bool [2B, N], row-major patches, true where a patch is masked. A mask may fall short of
            its drawn ratio when no further block fits; it never exceeds it.
        """
        rng = Random(seed)
        edges = self._edges.tolist()
        bits = [
            self._draw(rng, int(self.num_patches * (low + (high - low) * rng.random())))
            for low, high in pairwise(edges)
        ]
        bits += [0] * (self.num_crops - self.num_masked_crops)
        keys = [rng.random() for _ in bits]
        num_bytes = -(-self.num_patches // 8)
        packed = b"".join(
            mask.to_bytes(num_bytes, "little") for _, mask in sorted(zip(keys, bits, strict=True))
        )
        rows = np.frombuffer(packed, np.uint8).reshape(self.num_crops, num_bytes)
        unpacked = np.unpackbits(rows, axis=1, bitorder="little")[:, : self.num_patches]
        return torch.from_numpy(np.ascontiguousarray(unpacked)).bool()

    def _draw(self, rng: Random, target: int) -> int:
        """One mask with at most `target` patches; bit i of the result is patch i."""
        mask, count = 0, 0
        while count < target:
            grown = self._add_block(rng, mask, min(target - count, self._max_block))
            if grown == mask:
                break
            mask, count = grown, grown.bit_count()
        return mask

    def _add_block(self, rng: Random, mask: int, max_new: int) -> int:
        """The mask with one more rectangle that adds 1..max_new patches, or unchanged."""
        rows, columns = self.grid
        for _ in range(_TRIES_PER_BLOCK):
            area = _MIN_BLOCK_PATCHES + (max_new - _MIN_BLOCK_PATCHES) * rng.random()
            aspect = math.exp(_LOG_ASPECT * (2 * rng.random() - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top = int(rng.random() * (rows - height + 1))
            left = int(rng.random() * (columns - width + 1))
            block = self._rectangle(top, left, height, width)
            if 0 < (block & ~mask).bit_count() <= max_new:
                return mask | block
        return mask

    def _rectangle(self, top: int, left: int, height: int, width: int) -> int:
        """A rectangle of patches as bits."""
        columns = self.grid[1]
        line = ((1 << width) - 1) << left
        # The repunit in base 2^columns puts a copy of the line into each of `height` rows.
        lines = line * (((1 << (columns * height)) - 1) // ((1 << columns) - 1))
        return lines << (top * columns)
