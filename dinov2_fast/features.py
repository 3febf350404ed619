"""Features of a frozen backbone over any image source: what evaluation and curation start from."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinov2_fast.config import DataConfig
from dinov2_fast.errors import ConfigError, DataError, OutputError
from dinov2_fast.models.frozen import default_image_px, default_resize_px, find_weights, load_model

if TYPE_CHECKING:
    from dinov2_fast.data.image_source import ImageSource
    from dinov2_fast.models.vision_transformer import VisionTransformer

NO_LABEL = -1
# Batches decoded ahead of the network: enough to hide decoding, little memory.
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Features:
    """Features of n images in the order of their source, unreadable ones left out."""

    cls: Tensor
    """[n, C] normalised CLS tokens, fp32 on the CPU."""
    patch_mean: Tensor
    """[n, C] mean of the normalised patch tokens, fp32 on the CPU."""
    labels: Tensor
    """[n] int64, positions in `class_names`; `NO_LABEL` where the source has none."""
    names: list[str]
    """Names of the n images."""
    class_names: list[str]
    """Names of the classes; empty without labels."""
    unreadable: list[tuple[str, str]]
    """Name and reason of each image that could not be decoded."""
    image_px: int
    """Side of the square the network saw."""
    resize_px: int
    """Side to which the shorter edge was resized before the centre crop."""
    seconds: float = 0.0
    """Time it took, decoding included."""

    def labelled(self) -> Features:
        """These features without the images that have no label."""
        keep = self.labels != NO_LABEL
        return replace(
            self,
            cls=self.cls[keep],
            patch_mean=self.patch_mean[keep],
            labels=self.labels[keep],
            names=[name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept],
        )

    def save(self, path: Path) -> None:
        """Write tensors to `path` (.safetensors) and the rest to the .json file beside it.

        Raises:
            ConfigError: the name does not end in .safetensors.
            OutputError: the files cannot be written.
        """
        from safetensors.torch import save_file

        side = _side_file(path)
        tensors = {"cls": self.cls, "patch_mean": self.patch_mean, "labels": self.labels}
        keys = ("names", "class_names", "unreadable", "image_px", "resize_px", "seconds")
        record = {key: getattr(self, key) for key in keys}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(side) as temporary:
                temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            with _replacing(path) as temporary:
                save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        except OSError as error:
            raise OutputError(f"features: cannot write {path}: {error.strerror}") from error

    @staticmethod
    def load(path: Path) -> Features:
        """Read what `save` wrote.

        Raises:
            DataError: one of the two files is missing, damaged or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            record = json.loads(_side_file(path).read_text(encoding="utf-8"))
            record["unreadable"] = [(name, reason) for name, reason in record["unreadable"]]
            features = Features(**tensors, **record)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"features: cannot read {path}: {error}") from error
        lengths = {len(features.names), *(len(tensor) for tensor in tensors.values())}
        if len(lengths) != 1:
            raise DataError(f"features: {path} and {_side_file(path).name} are of different runs")
        return features


def extract_features(
    model: VisionTransformer,
    source: ImageSource,
    *,
    image_px: int | None = None,
    resize_px: int | None = None,
    batch_size: int = 64,
    num_workers: int = -1,
    precision: str = "fp32",
    max_pixels: int = DataConfig.max_pixels,
) -> Features:
    """Features of every readable image of a source.

    The same call on the same machine gives the same bits: batches are cut in the order of the
    source, whatever the number of threads, and the model is used as in evaluation.

    Args:
        model: the backbone, on the device that computes; its mode is restored afterwards.
        source: images.
        image_px: side of the square the network sees; None: see `default_image_px`.
        resize_px: side of the shorter edge before the centre crop; None: `default_resize_px`.
        batch_size: images per forward.
        num_workers: threads that decode; -1: one for each free core; 0: no thread.
        precision: fp32, or bf16 for the forward under autocast.
        max_pixels: images announcing more are reported as unreadable.

    Raises:
        DataError: no image could be read.
        ConfigError: sizes or precision that make no sense.
    """
    image_px = default_image_px(model) if image_px is None else image_px
    if image_px % model.patch_size:
        raise ConfigError(
            f"features: image_px must be a multiple of the patch size {model.patch_size}, "
            f"got {image_px}"
        )
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"features: precision must be fp32 or bf16, got {precision!r}")
    device, was_training = model.cls_token.device, model.training
    model.eval()

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = model.forward_features(images.to(device))
        patches = tokens["x_norm_patchtokens"].float()
        return tokens["x_norm_clstoken"].float(), patches.mean(dim=1)  # [B, N, C] -> [B, C]

    try:
        return _collect(
            forward,
            source,
            image_px=image_px,
            resize_px=default_resize_px(image_px) if resize_px is None else resize_px,
            batch_size=batch_size,
            num_workers=num_workers,
            max_pixels=max_pixels,
        )
    finally:
        model.train(was_training)


def pixel_features(
    source: ImageSource,
    *,
    image_px: int,
    resize_px: int | None = None,
    batch_size: int = 64,
    num_workers: int = -1,
) -> Features:
    """The normalised pixels a network would see, as features: what learning has to beat.

    Args:
        source: images.
        image_px: side of the square.
        resize_px: side of the shorter edge before the centre crop; None: `default_resize_px`.
        batch_size: images decoded at a time.
        num_workers: threads that decode; -1: one for each free core; 0: no thread.

    Returns:
        `cls` holds all pixels [n, 3 * image_px ** 2], `patch_mean` the mean colour [n, 3].

    Raises:
        DataError: no image could be read.
        ConfigError: sizes that make no sense.
    """
    return _collect(
        lambda images: (images.flatten(1), images.mean(dim=(2, 3))),
        source,
        image_px=image_px,
        resize_px=default_resize_px(image_px) if resize_px is None else resize_px,
        batch_size=batch_size,
        num_workers=num_workers,
        max_pixels=DataConfig.max_pixels,
    )


def embed(
    checkpoint: Path,
    *,
    data: Path,
    out: Path,
    device: str = "auto",
    image_px: int | None = None,
    resize_px: int | None = None,
    batch_size: int = 64,
    num_workers: int = -1,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write the features of a folder, file list or tar files to a .safetensors file.

    Args:
        checkpoint: weight file or run directory.
        data: images, as for training.
        out: the file; names, labels and unreadable images go to the .json file beside it.
        device: auto, cpu, cuda or cuda:N.
        image_px: this and the rest as in `extract_features`.
        resize_px: see there.
        batch_size: see there.
        num_workers: see there.
        precision: see there.

    Returns:
        Counts, sizes and speed.

    Raises:
        CheckpointError: weights that cannot be loaded.
        DataError: no images there.
        OutputError: the file cannot be written.
    """
    from dinov2_fast.data.datasets import open_images

    side = _side_file(out)  # a wrong name is said before the work, not after it
    if out.exists() and out.samefile(find_weights(checkpoint)):
        raise ConfigError(f"embed: {out} holds the weights in use; choose another --out")
    model = load_model(checkpoint, device=device)
    features = extract_features(
        model,
        open_images(data),
        image_px=image_px,
        resize_px=resize_px,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
    )
    features.save(out)
    return {
        "images": len(features.names),
        "channels": features.cls.shape[1],
        "classes": len(features.class_names),
        "unreadable": features.unreadable,
        "image_px": features.image_px,
        "resize_px": features.resize_px,
        "out": str(out),
        "names": str(side),
        "seconds": round(features.seconds, 3),
        "images_per_second": round(len(features.names) / max(features.seconds, 1e-9), 1),
    }


@torch.no_grad()
def _collect(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    source: ImageSource,
    *,
    image_px: int,
    resize_px: int,
    batch_size: int,
    num_workers: int,
    max_pixels: int,
) -> Features:
    """Features of all readable images; `forward` maps [B, 3, H, W] to two tensors [B, ...]."""
    from dinov2_fast.data.augmentation import evaluation_transform

    if not 1 <= image_px <= resize_px:
        raise ConfigError(
            f"features: image_px must be in [1, resize_px {resize_px}], got {image_px}"
        )
    if batch_size < 1:
        raise ConfigError(f"features: batch_size must be at least 1, got {batch_size}")
    if num_workers < -1:
        raise ConfigError(f"features: num_workers must be at least -1, got {num_workers}")
    start = time.perf_counter()
    load = _loader(source, evaluation_transform(image_px, resize_px), max_pixels)
    outputs: list[tuple[Tensor, Tensor]] = []
    read: list[int] = []
    unreadable: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        # Decoding silences warnings for its time, but threads share the filters and would restore
        # them under each other's feet.
        warnings.simplefilter("ignore")
        for batch in _batches(load, len(source), batch_size, num_workers):
            images = []
            for index, image in batch:
                if isinstance(image, str):
                    unreadable.append((source.name(index), image))
                else:
                    read.append(index)
                    images.append(image)
            if images:
                cls, patch_mean = forward(torch.stack(images))
                outputs.append((cls.cpu(), patch_mean.cpu()))
    if not read:
        reason = f", the first ({unreadable[0][0]}): {unreadable[0][1]}" if unreadable else ""
        raise DataError(f"features: none of {len(source)} images could be read{reason}")
    labels = [source.label(index) for index in read]
    return Features(
        cls=torch.cat([cls for cls, _ in outputs]),
        patch_mean=torch.cat([patch_mean for _, patch_mean in outputs]),
        labels=torch.tensor([NO_LABEL if label is None else label for label in labels]),
        names=[source.name(index) for index in read],
        class_names=list(source.class_names),
        unreadable=unreadable,
        image_px=image_px,
        resize_px=resize_px,
        seconds=time.perf_counter() - start,
    )


def _loader(
    source: ImageSource, transform: Callable[[Any], Tensor], max_pixels: int
) -> Callable[[int], Tensor | str]:
    """A function that loads image i; a broken image becomes the reason as a string."""
    from dinov2_fast.data.decoding import UnreadableImage, decode_image

    def load(index: int) -> Tensor | str:
        try:
            image = decode_image(source.read(index), max_pixels=max_pixels)
        except UnreadableImage as error:
            return str(error)
        return transform(image)

    return load


def _batches(
    load: Callable[[int], Tensor | str], num_images: int, batch_size: int, num_workers: int
) -> Iterator[list[tuple[int, Tensor | str]]]:
    """Loaded images in order, a few batches ahead of the consumer; memory stays bounded."""
    groups = [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]
    if num_workers == 0:
        for group in groups:
            yield [(index, load(index)) for index in group]
        return
    if num_workers < 0:
        num_workers = len(os.sched_getaffinity(0))
    # PIL releases the interpreter lock while it decodes and resizes, so threads are enough.
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as pool:
        waiting: deque[list[tuple[int, Future[Tensor | str]]]] = deque()
        try:
            for group in groups:
                waiting.append([(index, pool.submit(load, index)) for index in group])
                if len(waiting) > _BATCHES_AHEAD:
                    yield [(index, future.result()) for index, future in waiting.popleft()]
            while waiting:
                yield [(index, future.result()) for index, future in waiting.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _side_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ConfigError(f"features: the file's name must end in .safetensors, got {path.name!r}")
    return path.with_suffix(".json")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
