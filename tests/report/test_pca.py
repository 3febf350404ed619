from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.report.pca import pca_rgb
from tests.inputs import randn

GRID = (12, 12)


def planted(num_images: int = 3, *, channels: int = 32, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Images whose central square differs strongly from the rest, and has three parts inside.

    Returns tokens [B, N, C] and parts [B, h, w]: 0 background, 1 to 3 the parts of the object.
    """
    rows, columns = GRID
    parts = torch.zeros(num_images, rows, columns, dtype=torch.long)
    for image in range(num_images):
        top, left = 3 + image % 2, 3
        parts[image, top : top + 6, left : left + 2] = 1
        parts[image, top : top + 6, left + 2 : left + 4] = 2
        parts[image, top : top + 6, left + 4 : left + 6] = 3
    directions = torch.linalg.qr(randn(channels, 4))[0].T  # [4, C], orthonormal
    tokens = 0.05 * randn(num_images, rows, columns, channels)
    tokens += 10.0 * sign * (parts > 0)[..., None] * directions[0]
    for part in (1, 2, 3):
        tokens += (parts == part)[..., None] * directions[part]
    return tokens.flatten(1, 2), parts


@pytest.mark.parametrize("sign", [1.0, -1.0])  # the sign of a component is arbitrary
def test_the_central_object_is_the_foreground_whatever_its_sign(sign: float):
    tokens, parts = planted(sign=sign)
    _, foreground = pca_rgb(tokens, GRID)
    assert torch.equal(foreground, parts > 0)


def test_parts_of_the_object_have_the_same_colour_in_all_images_and_different_ones_among_them():
    tokens, parts = planted()
    colors, _ = pca_rgb(tokens, GRID)
    means = torch.stack([colors[parts == part].mean(0) for part in (1, 2, 3)])
    spread = max(
        float((colors[parts == part] - means[part - 1]).norm(dim=-1).max()) for part in (1, 2)
    )
    apart = torch.pdist(means)
    assert float(apart.min()) > 0.5
    assert spread < 0.9  # the third component is noise here: three parts span two dimensions
    first_two = torch.stack([colors[parts == part][:, :2].std(0).max() for part in (1, 2, 3)])
    assert float(first_two.max()) < 0.1
    for image in range(3):
        own = torch.stack([colors[image][parts[image] == part].mean(0) for part in (1, 2, 3)])
        assert float((own - means)[:, :2].abs().max()) < 0.05


def test_colours_lie_in_the_unit_cube_and_the_background_is_black():
    tokens, _ = planted()
    colors, foreground = pca_rgb(tokens, GRID)
    assert colors.shape == (3, *GRID, 3)
    assert colors.dtype == torch.float32
    assert float(colors.min()) >= 0
    assert float(colors.max()) <= 1
    assert not bool(colors[~foreground].any())


def test_the_components_are_those_of_a_full_svd():
    tokens = randn(2, 144, 10)
    colors, foreground = pca_rgb(tokens, GRID, remove_background=False)
    assert bool(foreground.all())
    points = tokens.flatten(0, 1).double()
    points -= points.mean(0)
    axes = torch.linalg.svd(points, full_matrices=False).Vh[:3]
    scores = points @ axes.T  # [R, 3], up to signs
    inside = (colors.flatten(0, 2) > 0) & (colors.flatten(0, 2) < 1)
    for component in range(3):
        keep = inside[:, component]
        pair = torch.stack(
            [scores[keep, component], colors.flatten(0, 2)[keep, component].double()]
        )
        assert abs(float(torch.corrcoef(pair)[0, 1])) == pytest.approx(1.0, abs=1e-6)


def test_the_same_tokens_give_the_same_colours_and_turning_all_features_changes_none():
    tokens, _ = planted()
    colors, foreground = pca_rgb(tokens, GRID)
    again, _ = pca_rgb(tokens.clone(), GRID)
    assert torch.equal(colors, again)
    turned = tokens @ torch.linalg.qr(randn(32, 32, seed=3))[0]
    _, foreground_turned = pca_rgb(turned, GRID)
    assert torch.equal(foreground, foreground_turned)


def test_one_wild_patch_leaves_the_colours_of_the_others_apart():
    tokens, parts = planted()
    tokens[0, 0] = 1e3 * randn(32, seed=9)
    colors, _ = pca_rgb(tokens, GRID, remove_background=False)
    assert bool(torch.isfinite(colors).all())
    assert float(colors.flatten(0, 2).std(0).max()) > 0.05
    assert parts.any()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
def test_constant_features_have_no_foreground(value: float):
    colors, foreground = pca_rgb(torch.full((2, 144, 8), value), GRID)
    assert not bool(foreground.any())
    assert not bool(colors.any())


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_channels_than_colours_still_give_a_picture(channels: int):
    colors, _ = pca_rgb(randn(1, 144, channels), GRID, remove_background=False)
    assert bool(torch.isfinite(colors).all())
    assert torch.equal(colors[..., channels:], torch.full_like(colors[..., channels:], 0.5))


@pytest.mark.parametrize("grid", [(1, 9), (2, 5), (1, 1)])  # no patch but those at the border
def test_grids_without_an_interior_work(grid: tuple[int, int]):
    colors, foreground = pca_rgb(randn(2, grid[0] * grid[1], 4), grid)
    assert colors.shape == (2, *grid, 3)
    assert foreground.shape == (2, *grid)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\[B, 144, C\].*CLS"):
        pca_rgb(randn(1, 145, 4), GRID)
    with pytest.raises(ValueError, match="finite"):
        pca_rgb(torch.full((1, 144, 4), float("nan")), GRID)
