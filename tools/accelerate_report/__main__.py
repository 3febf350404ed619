"""`python -m tools.accelerate_report`: modelled training steps before and after `accelerate`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dinov2_fast.ops.stochastic_depth import keep_count
from tools.accelerate_report import counting, timing
from tools.kernel_report.page import table
from tools.kernel_report.pipes import GPUS

DROP_RATIOS = (0.0, 0.4)
KERNELS = Path(__file__).parents[2] / "docs" / "cuda-kernels.md"


@dataclass(frozen=True)
class Model:
    """Blocks of a published model.

    Args:
        name: for people.
        width: C.
        heads: H.
        depth: blocks.
    """

    name: str
    width: int
    heads: int
    depth: int


MODELS = (
    Model("ViT-S/14", 384, 6, 12),
    Model("ViT-B/14", 768, 12, 12),
    Model("ViT-L/14", 1024, 16, 24),
)


def timm_block(model: Model, drop_ratio: float) -> nn.Module:
    """A block of timm's vit_*_patch14_dinov2."""
    from timm.models.vision_transformer import Block

    options: dict[str, Any] = {"qkv_bias": True, "init_values": 1e-5, "drop_path": drop_ratio}
    return Block(model.width, model.heads, **options).train()


def transformers_block(model: Model, drop_ratio: float) -> nn.Module:
    """A layer of transformers' Dinov2Model."""
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

    config = Dinov2Config(
        hidden_size=model.width, num_attention_heads=model.heads, drop_path_rate=drop_ratio
    )
    config._attn_implementation = "sdpa"  # what a model of it gets
    return Dinov2Layer(config).train()


def growing(drop_ratio: float, depth: int) -> list[float]:
    """Timm's ratios: from 0 in the first block to the stated one in the last."""
    return [drop_ratio * i / (depth - 1) for i in range(depth)]


def constant(drop_ratio: float, depth: int) -> list[float]:
    """The ratios of transformers."""
    return [drop_ratio] * depth


Make = Callable[[Model, float], nn.Module]
LIBRARIES: dict[str, tuple[Make, Callable[[float, int], list[float]]]] = {
    "timm": (timm_block, growing),
    "transformers": (transformers_block, constant),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the report.

    Args:
        arguments: words of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.accelerate_report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--images", type=int, default=64, help="of 224 px in a batch")
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="default: all")
    parser.add_argument("--model", action="append", choices=[m.name for m in MODELS])
    options = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # imports of the libraries warn about their own futures
        chosen = [m for m in MODELS if m.name in (options.model or [m.name])]
        rows = made(options.library or list(LIBRARIES), chosen, options.images)
    print(json.dumps(rows, indent=1) if options.json else page(rows), end="")
    return 0


def made(
    libraries: Sequence[str],
    models: Sequence[Model],
    images: int,
) -> list[dict[str, Any]]:
    """Rows of library, model, drop path, GPU, modelled milliseconds and MiB kept.

    Args:
        libraries: of `LIBRARIES`.
        models: of `MODELS`.
        images: B.
    """
    rows: list[dict[str, Any]] = []
    counted_kernels = KERNELS.read_text(encoding="utf-8")
    cycles = {gpu: timing.attention_cycles(counted_kernels, gpu) for gpu in GPUS}
    for library in libraries:
        make, ratios_of = LIBRARIES[library]
        for model in models:
            counts: dict[tuple[bool, int], tuple[counting.Counted, counting.Counted]] = {}
            for drop_ratio in DROP_RATIOS:
                ratios = ratios_of(drop_ratio, model.depth)
                keys = [(ratio > 0, keep_count(images, ratio)) for ratio in ratios]
                for key, ratio in zip(keys, ratios, strict=True):
                    if key not in counts:
                        counts[key] = _counts(make, model, images, ratio)
                blocks = [counts[key] for key in keys]
                kept = [sum(b[i].kept_bytes for b in blocks) / 2**20 for i in range(2)]
                for gpu in GPUS:
                    kernels = (timing.ORIGINAL_ATTENTION, timing.OUR_ATTENTION)
                    before, after = (
                        _sum([timing.seconds(b[i], gpu, cycles[gpu], kernels[i]) for b in blocks])
                        for i in range(2)
                    )
                    row = {"library": library, "model": model.name, "images": images}
                    row |= {"drop_path": drop_ratio, "gpu": gpu.name}
                    row |= {"modelled_ms_before": before, "modelled_ms_after": after}
                    row |= {"ratio": sum(before.values()) / sum(after.values())}
                    rows.append(row | {"mib_kept_before": kept[0], "mib_kept_after": kept[1]})
    return rows


def _counts(
    make: Make, model: Model, images: int, drop_ratio: float
) -> tuple[counting.Counted, counting.Counted]:
    """A block as it is, and accelerated."""
    with counting.without_memory():
        before = counting.count_original(make(model, drop_ratio), images, timing.TOKENS)
        after = counting.count_accelerated(make(model, drop_ratio), images, timing.TOKENS)
    return before, after


def _sum(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Milliseconds of all blocks, part by part."""
    return {key: 1e3 * sum(part[key] for part in parts) for key in parts[0]}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The report for people.

    Args:
        rows: of `made`.
    """
    header = ["library", "model", "drop path", "GPU", "modelled ms before", "after", "ratio"]
    header += ["MiB kept before", "after"]
    lines = [
        [
            *(str(row[key]) for key in ("library", "model", "drop_path", "gpu")),
            *(f"{sum(row[f'modelled_ms_{when}'].values()):.1f}" for when in ("before", "after")),
            f"{row['ratio']:.2f}",
            *(f"{row[f'mib_kept_{when}']:,.0f}" for when in ("before", "after")),
        ]
        for row in rows
    ]
    images = rows[0]["images"]
    head = (
        "Modelled lower bounds, not measured (tools/accelerate_report/timing.py): the blocks'\n"
        f"part of a training step of {images} images of 224 px under autocast to bfloat16."
    )
    return f"{head}\n\n{table(header, lines)}"


if __name__ == "__main__":
    sys.exit(main())
