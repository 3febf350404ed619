"""Fine-tune a timm ViT, its blocks accelerated, to tell photographs apart; under a minute on a CPU.

The pictures are crops of the photographs that scikit-image ships: the class of a crop is its
photograph, and test crops come from the other side of it. Weights are random unless `--checkpoint`
names a file that timm reads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2_fast import accelerate, restore
from dinov2_fast.data.photo_crops import CropSettings, write_photo_crops
from dinov2_fast.demo import find_photographs

PX, PATCH = 48, 8
MODEL = {"img_size": PX, "patch_size": PATCH, "depth": 4, "drop_path_rate": 0.2}


def read_crops(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, PX, PX] in [-1, 1] and labels [B] of FOLDER/CLASS/FILE."""
    files = sorted(folder.glob("*/*.png"))
    names = sorted({file.parent.name for file in files})
    pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) for file in files]
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, labels


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose class the model names."""
    model.eval()
    found = torch.cat([model(part).argmax(dim=1) for part in images.split(64)])
    return (found == labels).float().mean().item()


def fine_tune(model: nn.Module, images: Tensor, labels: Tensor, arguments: Any) -> float:
    """Train in place; seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, fused=True)
    warmup_steps = max(1, arguments.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup_steps, (arguments.steps - step) / arguments.steps),
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    begin = time.perf_counter()
    model.train()
    for _ in range(arguments.steps):
        chosen = torch.randint(len(images), (arguments.batch_size,), generator=generator)
        batch = images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        loss = nn.functional.cross_entropy(model(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - begin


def main() -> None:
    """Cut the crops, accelerate, fine-tune, and say what it brought."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm ViT")
    parser.add_argument("--checkpoint", default="", help="weights of that model")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--original", action="store_true", help="do not accelerate, to compare")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_photo_crops(find_photographs(), Path(folder), settings=CropSettings(saved_px=PX))
        train, test = (read_crops(Path(folder) / part) for part in ("train", "test"))
    num_classes = int(train[1].max()) + 1
    model = timm.create_model(
        arguments.model, checkpoint_path=arguments.checkpoint, num_classes=num_classes, **MODEL
    )
    if not arguments.original:
        print(accelerate(model))
    before = accuracy(model, *test)
    seconds = fine_tune(model, *train, arguments)
    restore(model)  # the weights belong to an ordinary timm model again
    after = accuracy(model, *test)
    print(f"{len(train[1])} crops of {num_classes} photographs, {arguments.steps} steps")
    print(f"accuracy on {len(test[1])} test crops: {before:.1%} before, {after:.1%} after")
    print(f"{seconds:.1f} s of training, {seconds / arguments.steps * 1e3:.0f} ms a step")


if __name__ == "__main__":
    main()
