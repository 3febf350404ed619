"""A frozen backbone from what a user points at: a weight file or the directory of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from dinov2_fast.errors import CheckpointError, ConfigError
from dinov2_fast.models.pretrained import load_backbone
from dinov2_fast.models.vision_transformer import VisionTransformer

PROTOCOL_PX = 224
"""Largest image side used unless one is asked for; the published evaluations use it."""


def default_image_px(model: VisionTransformer) -> int:
    """Side of the images a model is evaluated at: its own, but no more than `PROTOCOL_PX`.

    Its own is the one its position embeddings were made for. Published weights have theirs for
    518 px, while the published classification results are at 224 px.

    Returns:
        A multiple of the patch size, at least one patch.
    """
    largest_px = max(1, PROTOCOL_PX // model.patch_size) * model.patch_size
    return min(model.image_px, largest_px)


def default_resize_px(image_px: int) -> int:
    """Side to which the shorter edge is resized before the centre crop of `image_px`.

    From 224 px on it is 8/7 of the crop, as in the published evaluations (256 for 224). Below it
    equals the crop: so small an image is usually cut to its object already.
    """
    return round(image_px * 256 / 224) if image_px >= PROTOCOL_PX else image_px


def resolve_device(device: str) -> torch.device:
    """The device of a name; auto takes the GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device: {device} asked for, {torch.cuda.device_count()} GPUs are visible; "
                "use --device cpu"
            )
    except RuntimeError as error:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from error
    return resolved


def find_weights(checkpoint: Path) -> Path:
    """The weight file that a path given by a user means.

    Args:
        checkpoint: a weight file; a run directory, of which the finished teacher is taken or else
            the newest checkpoint; or a folder in the layout of transformers.

    Raises:
        CheckpointError: there is none.
    """
    if checkpoint.is_file():
        return checkpoint
    if not checkpoint.exists():
        raise CheckpointError(f"checkpoint: {checkpoint} does not exist")
    teacher = checkpoint / "teacher.safetensors"
    if teacher.is_file():
        return teacher
    if (checkpoint / "config.json").is_file():
        return checkpoint
    states = sorted(checkpoint.glob("checkpoints/step-*/state.safetensors"))
    states = states or sorted(checkpoint.glob("state.safetensors"))
    if states:
        return states[-1]
    raise CheckpointError(
        f"checkpoint: {checkpoint} holds neither teacher.safetensors nor checkpoints/; "
        "give a weight file or a run directory"
    )


def load_model(checkpoint: Path, *, device: str = "auto") -> VisionTransformer:
    """A frozen backbone in evaluation mode.

    Args:
        checkpoint: weight file or run directory, see `find_weights`.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        CheckpointError: weights that are missing, damaged or of no known layout.
    """
    model = load_backbone(find_weights(checkpoint), device=resolve_device(device))
    return model.eval().requires_grad_(False)
