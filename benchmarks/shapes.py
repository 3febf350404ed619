"""DINOv2's shapes, shared by the benchmarks: a few images on a CPU, a batch on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.harness import CPU_ROW, GPU_ROW
from dinov2_fast.ops.stochastic_depth import KeptRows, draw_kept_rows, keep_count
from dinov2_fast.packing import Pack

CPU_IMAGES, GPU_IMAGES = 5, 64
DROP_RATIO = 0.4
GLOBAL_TOKENS, LOCAL_TOKENS = 257, 50  # CLS and the patches of 224 and 98 px, at patch 14
WIDTHS = {"ViT-S": 384, "ViT-B": 768}
HEAD_DIM = 64

FULL = pytest.mark.full


def crop_groups(num_images: int, drop_ratio: float = 0.0) -> tuple[tuple[int, int], ...]:
    """(sequences, tokens) of two global and eight local crops of each image, of those kept."""
    return tuple(
        (keep_count(crops * num_images, drop_ratio), tokens)
        for crops, tokens in ((2, GLOBAL_TOKENS), (8, LOCAL_TOKENS))
    )


def num_tokens(num_images: int, drop_ratio: float = 0.0) -> int:
    """Tokens of the pack of all crops, of those kept."""
    return sum(count * tokens for count, tokens in crop_groups(num_images, drop_ratio))


def cases(
    *,
    cpu: Sequence[tuple[int, ...]] = (),
    cuda: Sequence[tuple[int, ...]] = (),
    full: Sequence[tuple[int, ...]] = (),
) -> list[Any]:
    """Values of the arguments device and shape; `full` are large shapes on the CPU."""
    groups = (
        ("cpu", cpu, (CPU_ROW,)),
        ("cpu", full, (CPU_ROW, FULL)),
        ("cuda", cuda, (GPU_ROW,)),
    )
    return [
        pytest.param(device, shape, marks=marks, id=f"{device}-{'x'.join(map(str, shape))}")
        for device, shapes, marks in groups
        for shape in shapes
    ]


def _kept(num_images: int, width: int) -> tuple[int, int, int]:
    return num_tokens(num_images), num_tokens(num_images, DROP_RATIO), width


def draw_rows(all_tokens: int, device: str) -> KeptRows:
    """Rows that a branch keeps, whole sequences as in training.

    Args:
        all_tokens: T of `KEPT_ROWS`.
        device: "cpu" or "cuda".
    """
    pack = Pack.from_groups(crop_groups(all_tokens // num_tokens(1)), device)
    kept = draw_kept_rows(pack, DROP_RATIO, torch.Generator().manual_seed(0))
    assert kept is not None  # the ratio is not 0
    return kept


# (T, R, C): tokens of a pack, those a branch keeps, channels. The large shapes on the CPU are past
# its caches.
KEPT_ROWS = cases(
    cpu=[_kept(CPU_IMAGES, WIDTHS["ViT-S"])],
    full=[_kept(CPU_IMAGES, WIDTHS["ViT-B"]), _kept(8 * CPU_IMAGES, WIDTHS["ViT-S"])],
    cuda=[_kept(GPU_IMAGES, width) for width in WIDTHS.values()],
)

# (rows, F): kept tokens of a pack, and the hidden width of a plain feed-forward layer.
HIDDEN = cases(
    cpu=[(num_tokens(CPU_IMAGES, DROP_RATIO), 4 * WIDTHS["ViT-S"])],
    full=[(num_tokens(CPU_IMAGES, DROP_RATIO), 4 * WIDTHS["ViT-B"])],
    cuda=[(num_tokens(GPU_IMAGES), 4096)],  # ViT-L
)

# (rows, 2F): tokens of a pack, and the output width of a gated layer's first product.
GATED_HIDDEN = cases(
    cpu=[(1028, 5504)],  # ViT-L with SwiGLU: four 224 px crops
    full=[(394, 8192)],  # ViT-g: one 224 px crop and a few local ones
    cuda=[(num_tokens(32), 8192), (num_tokens(64), 5504)],
)

# (sequences, heads, tokens): kept global crops, kept local crops, one image of 518 px.
HEADS = cases(
    cpu=[(count, 6, tokens) for count, tokens in crop_groups(CPU_IMAGES, DROP_RATIO)],
    full=[(1, 6, 1370)],
    cuda=[(count, 16, tokens) for count, tokens in crop_groups(GPU_IMAGES, DROP_RATIO)],
)

# (rows, K): CLS rows and masked patches, and the prototypes of small runs and of the published
# recipes.
SCORES = cases(cpu=[(394, 8192)], full=[(394, 65536)], cuda=[(2048, 65536)])
