"""One setting of a whole training step, and the batch that every contender gets."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dinov2_fast.config import (
    CropConfig,
    HeadConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
)
from dinov2_fast.data.collate import Batch, index_masks
from dinov2_fast.data.masking import BlockMasks
from dinov2_fast.errors import ConfigError
from dinov2_fast.models.presets import ARCHITECTURES, Architecture, architecture

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORGET_PEAK = Path("/proc/self/clear_refs")  # written to, the kernel forgets the peak of memory
_SMALLEST = {"prototypes": 1, "batch_size": 1, "threads": 1, "steps": 1}


@dataclass(frozen=True)
class StepSetting:
    """What one step computes: the recipe's crops, masks and objective at one size."""

    arch: str = "vits14"
    """Architecture; `vits` stands for `vits14`."""
    prototypes: int = 65536
    """K."""
    batch_size: int = 5
    """B, images. With 5, kept samples are whole numbers at a drop ratio of 0.4."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of networks and scores."""
    drop_ratio: float = 0.4
    """Share of samples that each residual branch drops."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the step runs."""
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    """CPU threads of torch."""
    steps: int = 2
    """Timed steps of a process, after one that is not."""
    global_px: int = 224
    """Side of the 2 global crops of an image."""
    local_px: int = 98
    """Side of its 8 local crops."""

    def checked(self) -> StepSetting:
        """The setting with its architecture's full name.

        Raises:
            ConfigError: a value that no step can be built from.
        """
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) < smallest:
                shown = name.replace("_", "-")
                raise ConfigError(
                    f"bench: --{shown} must be at least {smallest}, got {getattr(self, name)}"
                )
        if not 0 <= self.drop_ratio < 1:
            raise ConfigError(f"bench: --drop-ratio must be in [0, 1), got {self.drop_ratio}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("bench: --device cuda, but torch sees no GPU; use --device cpu")
        if self.device == "cpu" and not FORGET_PEAK.exists():
            raise ConfigError(
                f"bench: --device cpu reads peak memory in {FORGET_PEAK.parent}, which only Linux "
                f"has, got {platform.system()}; use --device cuda, or `pytest benchmarks`"
            )
        name = self.arch if self.arch in ARCHITECTURES else f"{self.arch}14"
        if architecture(name if name in ARCHITECTURES else self.arch).num_registers:
            raise ConfigError(
                f"bench: the eager reference has no registers, got --arch {self.arch}; "
                f"use {self.arch.removesuffix('_reg4')}"
            )
        return dataclasses.replace(self, arch=name)

    @property
    def architecture(self) -> Architecture:
        """What the architecture's name stands for."""
        return architecture(self.arch)

    def configs(self) -> tuple[ModelConfig, LossConfig, CropConfig]:
        """Backbone, objective and crops in the package's own configuration."""
        head = HeadConfig(num_prototypes=self.prototypes)
        return (
            ModelConfig(arch=self.arch, drop_ratio=self.drop_ratio),
            LossConfig(centering="softmax_centering", dino_head=head),
            CropConfig(global_px=self.global_px, local_px=self.local_px),
        )

    def block_masks(self) -> BlockMasks:
        """The recipe's masks for this batch."""
        side = self.global_px // self.architecture.patch_size
        masks = MaskConfig()
        return BlockMasks(
            (side, side),
            num_crops=2 * self.batch_size,
            probability=masks.probability,
            min_ratio=masks.min_ratio,
            max_ratio=masks.max_ratio,
        )

    def batch(self, *, seed: int = 0) -> Batch:
        """Noise crops with the recipe's masks; the same for the same setting and seed.

        Args:
            seed: of pixels and masks.
        """
        _, _, crops = self.configs()
        generator = torch.Generator().manual_seed(seed)
        block_masks = self.block_masks()
        masks = block_masks(seed)
        indices, weights, num_masked = index_masks(masks, upper_bound=block_masks.upper_bound)
        global_crops, local_crops = (
            torch.randn(count * self.batch_size, 3, px, px, generator=generator)
            for count, px in ((2, crops.global_px), (crops.num_local, crops.local_px))
        )
        return Batch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            mask_indices=indices,
            mask_weights=weights,
            num_masked=num_masked,
            step=0,
            sample_indices=torch.arange(self.batch_size),
        ).to(self.device)
