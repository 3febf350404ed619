"""ViTs of timm and transformers as they are and accelerated: training steps and inference.

Drop path as the library means it: timm's ratio grows from 0 in the first block to the stated one in
the last, that of transformers is the same in all. Rows also state the bytes kept for the backward
pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_block import saved_bytes
from benchmarks.harness import CPU_ROW, measure, skip_unless_available
from benchmarks.shapes import DROP_RATIO, FULL
from dinov2_fast import accelerate
from dinov2_fast.ops.stochastic_depth import keep_count

PX, PATCH, WIDTH, HEADS = 224, 14, 384, 6  # ViT-S/14
TOKENS = 1 + (PX // PATCH) ** 2
NUM_CLASSES = 10

# (blocks, images)
CASES = [
    pytest.param((2, 4), id="2 blocks, 4 images"),
    pytest.param((12, 8), id="ViT-S, 8 images", marks=FULL),
    pytest.param((12, 1), id="ViT-S, 1 image", marks=FULL),
]

pytestmark = [
    CPU_ROW,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def timm_model(depth: int, drop_ratio: float) -> nn.Module:
    """Timm's DINOv2 ViT-S/14 with a head."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"img_size": PX, "depth": depth, "num_classes": NUM_CLASSES}
    return timm.create_model("vit_small_patch14_dinov2", drop_path_rate=drop_ratio, **options)


def transformers_model(depth: int, drop_ratio: float) -> nn.Module:
    """The same of transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        image_size=PX,
        patch_size=PATCH,
        drop_path_rate=drop_ratio,
        num_labels=NUM_CLASSES,
    )
    return transformers.Dinov2ForImageClassification(config)


LIBRARIES: dict[str, Callable[[int, float], nn.Module]] = {
    "timm": timm_model,
    "transformers": transformers_model,
}


def num_flops(depth: int, images: int, *, training: bool) -> int:
    """Products of all layers and attention of images that nothing drops."""
    forward = images * TOKENS * depth * (2 * 12 * WIDTH**2 + 4 * TOKENS * WIDTH)
    return forward * (3 if training else 1)


def step(model: nn.Module, optimizer: Any, x: Tensor, labels: Tensor) -> None:
    """One step of a classification fine-tune."""
    out: Any = model(x)
    optimizer.zero_grad()
    nn.functional.cross_entropy(getattr(out, "logits", out), labels).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("mode", "drop_ratio"), [("training", 0.0), ("training", DROP_RATIO), ("inference", 0.0)]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("contender", ["original", "accelerated"])
def test_accelerate(
    benchmark: Any,
    contender: str,
    library: str,
    case: tuple[int, int],
    mode: str,
    drop_ratio: float,
):
    depth, images = case
    skip_unless_available("attention", "native", "cpu")
    torch.manual_seed(0)
    model = LIBRARIES[library](depth, drop_ratio).train(mode == "training")
    if contender == "accelerated":
        accelerate(model)
    x, labels = torch.randn(images, 3, PX, PX), torch.arange(images) % NUM_CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    kept = 0
    if mode == "training":
        kept = saved_bytes(model, lambda: getattr(out := model(x), "logits", out))
        run = functools.partial(step, model, optimizer, x, labels)
    else:
        run = torch.inference_mode()(functools.partial(model, x))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measure(
        benchmark,
        run,
        op="accelerate",
        backend=f"{library} {contender}",
        dtype=torch.float32,
        shape=(depth, images, TOKENS, WIDTH),
        mode=f"{mode}, drop path {drop_ratio:g}",
        device="cpu",
        # weights, and in training their gradients and two moments, read and written
        num_bytes=4 * (parameters * (9 if mode == "training" else 1) + x.numel()),
        num_flops=num_flops(depth, images, training=mode == "training"),
    )
    benchmark.extra_info.update(saved_bytes=kept, kept_samples=keep_count(images, drop_ratio))
