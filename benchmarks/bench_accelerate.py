"""ViTs of timm and transformers as they are and accelerated: training steps and inference.

Drop path as the library means it: timm's ratio grows from 0 in the first block to the stated one in
the last, that of transformers is the same in all. bfloat16 is the libraries' own way, autocast.
Small cases show that no batch is slower than before. Rows also state the bytes kept for the
backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import CPU_ROW, measure, skip_unless_available
from benchmarks.shapes import DROP_RATIO, FULL
from dinov2_fast import accelerate
from dinov2_fast.bench.saved import saved_bytes
from dinov2_fast.ops.stochastic_depth import keep_count

PATCH, WIDTH, HEADS = 14, 384, 6  # ViT-S/14
NUM_CLASSES = 10

FLOATS = (torch.float32, torch.bfloat16)


def in_floats(
    case: tuple[int, int, int], name: str, *, short: tuple[torch.dtype, ...] = ()
) -> list[Any]:
    """A case, (blocks, images, px), in both types; those that are not in `short` are large."""
    return [
        pytest.param(case, dtype, id=f"{name}-{dtype}", marks=() if dtype in short else FULL)
        for dtype in FLOATS
    ]


# The toy alone is short: in bf16 an AVX2 processor takes up to 3 s for the library's step of the
# second.
CASES = [
    *in_floats((2, 4, 28), "2 blocks, 4 images of 28 px", short=FLOATS[:1]),  # a toy: 20 tokens
    # Below the limit of owned halves.
    *in_floats((2, 8, 98), "2 blocks, 8 images of 98 px"),
    *in_floats((2, 4, 224), "2 blocks, 4 images"),
    *in_floats((12, 8, 224), "ViT-S, 8 images"),
    *in_floats((12, 1, 224), "ViT-S, 1 image"),
]

pytestmark = [
    CPU_ROW,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def timm_model(depth: int, px: int, drop_ratio: float) -> nn.Module:
    """Timm's DINOv2 ViT-S/14 with a head."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"img_size": px, "depth": depth, "num_classes": NUM_CLASSES}
    return timm.create_model("vit_small_patch14_dinov2", drop_path_rate=drop_ratio, **options)


def transformers_model(depth: int, px: int, drop_ratio: float) -> nn.Module:
    """The same of transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        image_size=px,
        patch_size=PATCH,
        drop_path_rate=drop_ratio,
        num_labels=NUM_CLASSES,
    )
    return transformers.Dinov2ForImageClassification(config)


LIBRARIES: dict[str, Callable[[int, int, float], nn.Module]] = {
    "timm": timm_model,
    "transformers": transformers_model,
}


def num_flops(depth: int, images: int, tokens: int, *, training: bool) -> int:
    """Products of all layers and attention of images that nothing drops."""
    forward = images * tokens * depth * (2 * 12 * WIDTH**2 + 4 * tokens * WIDTH)
    return forward * (3 if training else 1)


def loss_of(model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of a classification fine-tune, under autocast unless in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out: Any = model(x)
        return nn.functional.cross_entropy(getattr(out, "logits", out), labels)


def step(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    """One step of training."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """One forward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(x)


@pytest.mark.parametrize("contender", ["original", "accelerated"])  # in turn, row by row
@pytest.mark.parametrize(
    ("mode", "drop_ratio"), [("training", 0.0), ("training", DROP_RATIO), ("inference", 0.0)]
)
@pytest.mark.parametrize(("case", "dtype"), CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_accelerate(
    benchmark: Any,
    contender: str,
    library: str,
    case: tuple[int, int, int],
    mode: str,
    drop_ratio: float,
    dtype: torch.dtype,
):
    depth, images, px = case
    tokens = 1 + (px // PATCH) ** 2
    skip_unless_available("attention", "native", "cpu")
    torch.manual_seed(0)
    model = LIBRARIES[library](depth, px, drop_ratio).train(mode == "training")
    if contender == "accelerated":
        accelerate(model)
    x, labels = torch.randn(images, 3, px, px), torch.arange(images) % NUM_CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loss = functools.partial(loss_of, model, x, labels, dtype)
    training = mode == "training"
    kept = saved_bytes(model, loss) if training else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measure(
        benchmark,
        functools.partial(step, optimizer, loss)
        if training
        else functools.partial(infer, model, x, dtype),
        op="accelerate",
        backend=contender,
        dtype=dtype,
        shape=(depth, images, tokens, WIDTH),
        mode=f"{library} {mode}, drop path {drop_ratio:g}" if training else f"{library} {mode}",
        device="cpu",
        # weights, and in training their gradients and two moments, read and written
        num_bytes=4 * (parameters * (9 if training else 1) + x.numel()),
        num_flops=num_flops(depth, images, tokens, training=training),
    )
    benchmark.extra_info.update(saved_bytes=kept, kept_samples=keep_count(images, drop_ratio))
