"""Resizing position embeddings: both methods, when nothing is resized, precision, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dinov2_fast.models.position_embedding import RESIZE_MODES, resize_position_embedding
from tests.inputs import randn

MODES = RESIZE_MODES


def embedding(side: int = 4, channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(1, 1 + side * side, channels, dtype=dtype)


def as_map(pos_embed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return pos_embed[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))


@pytest.mark.parametrize("mode", MODES)
def test_the_stored_grid_is_returned_as_it_is(mode):
    pos_embed = embedding()

    assert resize_position_embedding(pos_embed, (4, 4), mode=mode) is pos_embed


@pytest.mark.parametrize("mode", MODES)
def test_the_same_number_of_patches_in_another_shape_is_resized(mode):
    pos_embed = embedding()

    resized = resize_position_embedding(pos_embed, (2, 8), mode=mode)

    assert resized.shape == pos_embed.shape
    assert not torch.equal(resized, pos_embed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [(7, 7), (2, 3), (9, 1), (4, 5)])
def test_rows_are_the_height_and_cls_is_untouched(mode, grid):
    # Positions that depend on the row alone must stay constant along each row.
    pos_embed = embedding(channels=2, dtype=torch.float64)
    pos_embed[0, 1:, 0] = torch.arange(4.0).repeat_interleave(4)

    resized = resize_position_embedding(pos_embed, grid, mode=mode)

    assert resized.shape == (1, 1 + grid[0] * grid[1], 2)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    rows = as_map(resized, *grid)[0, 0]
    torch.testing.assert_close(rows, rows[:, :1].expand(grid), rtol=0, atol=1e-14)
    assert rows[:, 0].diff().gt(0).all()


@pytest.mark.parametrize("grid", [(7, 7), (16, 16), (37, 50), (53, 2)])
def test_official_samples_with_the_offset_factor_and_without_antialias(grid):
    pos_embed = embedding(side=37)
    expected = F.interpolate(
        as_map(pos_embed, 37, 37),
        scale_factor=((grid[0] + 0.1) / 37, (grid[1] + 0.1) / 37),
        mode="bicubic",
    )

    resized = resize_position_embedding(pos_embed, grid, mode="official")

    assert torch.equal(as_map(resized, *grid), expected)


def test_official_known_sample():
    # From 4 to 1: the sample lies at (0 + 0.5) * 4 / 1.1 - 0.5 = 1.318 and not in the middle.
    pos_embed = embedding(channels=1, dtype=torch.float64)
    pos_embed[0, 1:, 0] = torch.arange(4.0).repeat(4)

    resized = resize_position_embedding(pos_embed, (1, 1), mode="official")

    # Bicubic (a = -0.75) reproduces no straight line exactly; its four taps at offset t do this.
    t = 0.5 * 4 / 1.1 - 0.5 - 1
    a = -0.75

    def near(x: float) -> float:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: float) -> float:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    expected = 0 * far(1 + t) + 1 * near(t) + 2 * near(1 - t) + 3 * far(2 - t)
    assert abs(resized[0, 1, 0].item() - expected) < 1e-14


@pytest.mark.parametrize("grid", [(7, 7), (37, 50)])
def test_antialias_goes_by_size(grid):
    pos_embed = embedding(side=37)
    expected = F.interpolate(as_map(pos_embed, 37, 37), size=grid, mode="bicubic", antialias=True)

    resized = resize_position_embedding(pos_embed, grid, mode="antialias")

    assert torch.equal(as_map(resized, *grid), expected)


def test_the_methods_differ():
    pos_embed = embedding(side=37)

    first, second = (resize_position_embedding(pos_embed, (16, 16), mode=mode) for mode in MODES)

    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resized_in_float32(mode, dtype):
    pos_embed = embedding(dtype=dtype)

    resized = resize_position_embedding(pos_embed, (7, 3), mode=mode)

    expected = resize_position_embedding(pos_embed.float(), (7, 3), mode=mode)
    assert torch.equal(resized, expected.to(dtype))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_through_the_resize(mode):
    pos_embed = embedding(side=3, channels=2, dtype=torch.float64).requires_grad_()

    def resize(x: torch.Tensor) -> torch.Tensor:
        return resize_position_embedding(x, (5, 2), mode=mode)

    assert torch.autograd.gradcheck(resize, (pos_embed,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [(7, 7), (16, 5), (53, 2)])
def test_deterministic_algorithms_resize_by_products(monkeypatch, mode, grid):
    # float64 is exact enough to tell another sample or weight from rounding.
    pos_embed = embedding(side=37, dtype=torch.float64).requires_grad_()
    expected = resize_position_embedding(pos_embed, grid, mode=mode)
    upstream = randn(*expected.shape, dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected, pos_embed, upstream)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(F, "interpolate", constants_only(F.interpolate))

    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_position_embedding(pos_embed, grid, mode=mode)

    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(resized, pos_embed, upstream)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def constants_only(interpolate: Any) -> Any:
    """Torch's resize, which must see nothing that asks for a gradient."""

    def resize(maps: torch.Tensor, **options: Any) -> torch.Tensor:
        assert not maps.requires_grad
        return interpolate(maps, **options)

    return resize
