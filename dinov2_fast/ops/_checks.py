"""Checks that several ops share at their public door; messages name the op and the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinov2_fast.packing import Pack


def check_tensor(op: str, name: str, tensor: Tensor, *shape: int | str) -> None:
    """Refuse what is not a floating-point tensor of the expected shape.

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        tensor: the argument.
        shape: a number where the size is known, a shape letter where any size will do.
    Raises:
        TypeError: not a tensor, or not of a floating-point type.
        ValueError: another number of dimensions or another size.
    """
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    if fits:
        for expected, size in zip(shape, sizes, strict=True):
            # A loop, as generators cost what is checked many times.
            if expected != size and not isinstance(expected, str):
                fits = False
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a floating-point type, got {tensor.dtype}")


def check_like(op: str, like_name: str, like: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors that differ from one that was checked in shape, dtype or device.

    Raises:
        TypeError: not a tensor, or not of a floating-point type.
        ValueError: another shape, dtype or device.
    """
    shape, dtype, device = like.shape, like.dtype, like.device
    for name, tensor in tensors.items():
        # One look where all is well; only what is not pays for finding out why.
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:  # pyright: ignore[reportUnnecessaryIsInstance]
            check_tensor(op, name, tensor, *shape)
            raise ValueError(
                f"{op}: {name} must have the dtype of {like_name} {dtype}, got {tensor.dtype}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_device(op: str, expected: torch.device, **tensors: Tensor | Pack | None) -> None:
    """Refuse arguments that live on another device than the op's first one.

    Raises:
        ValueError: an argument on another device.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != expected:
            raise ValueError(f"{op}: {name} must be on {expected}, got {tensor.device}")


def check_pack(op: str, pack: Pack, tokens: Tensor) -> None:
    """Refuse a pack that does not describe the tokens.

    Raises:
        TypeError: not a `Pack`.
        ValueError: another number of tokens, or another device.
    """
    if not isinstance(pack, Pack):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{op}: pack must be a Pack, got {type(pack).__name__}")
    if pack.num_tokens != tokens.shape[0]:
        raise ValueError(
            f"{op}: pack must have the {tokens.shape[0]} tokens of its tensor, "
            f"got {pack.num_tokens}"
        )
    if pack.device != tokens.device:
        raise ValueError(f"{op}: pack must be on {tokens.device}, got {pack.device}")


def check_rows(op: str, name: str, rows: Tensor, device: torch.device) -> None:
    """Refuse row numbers of another type; `check_row_range` or a kernel looks at the numbers.

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        rows: [R] int64.
        device: where they must live.
    Raises:
        TypeError: not an int64 tensor.
        ValueError: not one-dimensional, or another device.
    """
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{op}: {name} must be an int64 tensor, got {getattr(rows, 'dtype', type(rows))}"
        )
    if rows.ndim != 1:
        raise ValueError(f"{op}: {name} must have shape [R], got {tuple(rows.shape)}")
    check_device(op, device, **{name: rows})


def check_row_range(op: str, name: str, rows: Tensor | None, num_rows: int) -> None:
    """Refuse row numbers outside [0, num_rows), where no kernel does and it needs no waiting.

    Raises:
        ValueError: such a number, on the CPU and outside torch.compile.
    """
    if rows is None or rows.device.type != "cpu" or rows.numel() == 0:
        return
    if torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= num_rows:
        raise ValueError(f"{op}: {name} must be in [0, {num_rows}), got {low} to {high}")


def check_positive(op: str, **values: float) -> None:
    """Refuse numbers that are not finite and greater than 0.

    Raises:
        ValueError: such a number; the message names the argument.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:  # what a compiler can trace of a number that it does not know
            raise ValueError(f"{op}: {name} must be finite and greater than 0, got {value}")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 if any of the tensors is, else float32: what sums and logarithms are kept in."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32
