from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_fast.data.collate import index_masks
from dinov2_fast.data.masking import BlockMasks

GRIDS = st.tuples(st.integers(2, 20), st.integers(2, 20))


@pytest.mark.parametrize(
    ("image_px", "patch_size", "cap"), [(224, 14, 128), (224, 16, 98), (518, 14, 666)]
)
def test_the_cap_on_a_block_is_rounded_from_left_to_right(image_px, patch_size, cap):
    side = image_px // patch_size
    masks = BlockMasks((side, side), num_crops=2)
    assert masks._max_block == cap == 0.5 * image_px // patch_size * image_px // patch_size


@settings(max_examples=80, deadline=None)
@given(
    GRIDS,
    st.integers(1, 12),
    st.floats(0, 1),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.integers(0, 2**64 - 1),
)
def test_masks_keep_every_promise(grid, num_images, probability, ratios, seed):
    num_crops = 2 * num_images
    maker = BlockMasks(
        grid,
        num_crops=num_crops,
        probability=probability,
        min_ratio=ratios[0],
        max_ratio=ratios[1],
    )
    masks = maker(seed)
    num_patches = grid[0] * grid[1]
    assert masks.shape == (num_crops, num_patches)
    assert masks.dtype == torch.bool
    counts = masks.sum(1)
    assert int((counts > 0).sum()) <= int(num_crops * probability) == maker.num_masked_crops
    assert int(counts.max()) <= num_patches * ratios[1] + 1e-3
    # Sorted, the i-th largest count stays below the i-th largest stratum's upper edge.
    edges = torch.linspace(ratios[0], ratios[1], maker.num_masked_crops + 1)[1:]
    upper = (num_patches * edges).int().flip(0)
    largest = counts.sort(descending=True).values[: maker.num_masked_crops]
    assert bool((largest <= upper).all())
    assert int(counts.sum()) <= maker.upper_bound

    indices, weights, num_masked = index_masks(masks, upper_bound=maker.upper_bound)
    assert indices.shape == weights.shape == (maker.upper_bound,)
    assert (indices.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert num_masked == int(counts.sum())
    rebuilt = torch.zeros(num_crops * num_patches, dtype=torch.bool)
    rebuilt[indices[:num_masked]] = True
    assert torch.equal(rebuilt.view_as(masks), masks)
    assert not indices[num_masked:].any()
    assert not weights[num_masked:].any()
    assert math.isclose(float(weights.sum()), int((counts > 0).sum()), rel_tol=1e-5, abs_tol=1e-6)
    for position, weight in zip(indices[:num_masked], weights[:num_masked], strict=True):
        assert weight == 1 / counts[position // num_patches].float()
        break  # the sum above holds for all; this pins the value


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (2, 20), (20, 2), (1, 9), (9, 1), (1, 1)])
def test_tiny_and_narrow_grids_terminate_within_the_bound(grid):
    maker = BlockMasks(grid, num_crops=8, min_ratio=0.4, max_ratio=1.0)
    for seed in range(20):
        assert int(maker(seed).sum()) <= maker.upper_bound


def test_shapes_are_constant_over_steps():
    maker = BlockMasks((4, 6), num_crops=6)
    shapes = {
        (masks.shape, index_masks(masks, upper_bound=maker.upper_bound)[0].shape)
        for masks in map(maker, range(30))
    }
    assert len(shapes) == 1


def test_half_of_the_crops_are_masked_in_stratified_amounts():
    # 16 x 16 patches and 64 crops: one production batch of 32 images.
    maker = BlockMasks((16, 16), num_crops=64)
    edges = torch.linspace(0.1, 0.5, 33).tolist()
    short = 0
    for seed in range(20):
        counts = maker(seed).sum(1)
        masked = counts[counts > 0].sort().values.tolist()
        assert len(masked) == 32
        for count, low, high in zip(masked, edges[:-1], edges[1:], strict=True):
            assert int(256 * low) - 2 <= count <= int(256 * high)
            short += count < int(256 * low)
    # A block that does not fit in ten tries ends a mask early; then it is a patch or so short.
    assert short < 0.15 * 20 * 32


def test_masks_are_shuffled_over_the_crops():
    maker = BlockMasks((8, 8), num_crops=8)
    places = Counter()
    heaviest = Counter()
    for seed in range(800):
        counts = maker(seed).sum(1)
        places.update((counts > 0).nonzero().flatten().tolist())
        heaviest[int(counts.argmax())] += 1
    # 400 and 100 expected per crop; bounds at 6 standard deviations.
    assert all(315 <= places[crop] <= 485 for crop in range(8))
    assert all(44 <= heaviest[crop] <= 156 for crop in range(8))


def test_a_block_is_a_full_rectangle_smaller_than_the_grid_on_both_sides():
    maker, rng, sizes = BlockMasks((6, 9), num_crops=2), Random(0), set()
    for trial in range(3000):
        max_new = 1 + trial % 27
        bits = maker._add_block(rng, 0, max_new)
        cells = [divmod(patch, 9) for patch in range(54) if bits >> patch & 1]
        if not cells:
            continue
        rows, columns = {row for row, _ in cells}, {column for _, column in cells}
        height = max(rows) - min(rows) + 1
        width = max(columns) - min(columns) + 1
        assert len(cells) == height * width <= max_new
        assert height < 6
        assert width < 9
        sizes.add((height, width))
    assert {(1, 1), (5, 2), (2, 8), (3, 3)} <= sizes


def test_the_smallest_block_has_an_area_of_4_before_rounding():
    maker, rng, sizes = BlockMasks((8, 8), num_crops=2), Random(0), set()
    for _ in range(300):
        bits = maker._add_block(rng, 0, 4)
        cells = [divmod(patch, 8) for patch in range(64) if bits >> patch & 1]
        sizes.add((len({row for row, _ in cells}), len({column for _, column in cells})))
    # Sides sqrt(4 a) and sqrt(4 / a), 0.3 <= a <= 1 / 0.3, rounded; products above 4 are refused.
    assert sizes - {(0, 0)} == {(1, 3), (1, 4), (2, 2), (3, 1), (4, 1)}


def test_no_block_adds_more_than_the_cap(monkeypatch):
    maker, added = BlockMasks((16, 16), num_crops=2), []
    original = BlockMasks._add_block

    def add_block(self, rng, mask, max_new):
        added.append(max_new)
        return original(self, rng, mask, max_new)

    monkeypatch.setattr(BlockMasks, "_add_block", add_block)
    maker._draw(Random(0), 250)
    assert added[0] == max(added) == 128


def test_the_ratio_is_drawn_uniformly_inside_of_its_part():
    # One masked crop: its part is the whole range of 0.1 to 0.5.
    maker = BlockMasks((16, 16), num_crops=2)
    shares = torch.tensor([int(maker(seed).sum()) / 256 for seed in range(400)])
    quarters = torch.histc(shares, bins=4, min=0.09, max=0.5)
    # 100 expected in each; 6 standard deviations of a binomial are 52.
    assert int(quarters.sum()) == 400
    assert bool((quarters > 48).all())


def test_a_block_counts_only_patches_it_adds():
    maker, rng = BlockMasks((8, 8), num_crops=2), Random(0)
    for _ in range(500):
        mask = rng.getrandbits(64)
        grown = maker._add_block(rng, mask, 5)
        assert grown & mask == mask
        assert (grown & ~mask).bit_count() <= 5


def test_blocks_reach_every_patch_equally_from_both_sides():
    maker = BlockMasks((7, 5), num_crops=20, probability=1.0)
    total = sum(maker(seed).sum(0) for seed in range(300)).view(7, 5).double()
    assert float(total.min()) > 0
    mirrored = (total - total.flip(0)).abs().max(), (total - total.flip(1)).abs().max()
    assert max(mirrored) < 6 * math.sqrt(2 * float(total.max()))


def test_masks_are_a_pure_function_of_the_seed():
    maker = BlockMasks((16, 16), num_crops=8)
    first = maker(1)
    maker(2)
    assert torch.equal(maker(1), first)
    assert not torch.equal(maker(2), first)


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": (0, 4), "num_crops": 2},
        {"grid": (4, 4), "num_crops": 0},
        {"grid": (4, 4), "num_crops": 2, "probability": 1.5},
        {"grid": (4, 4), "num_crops": 2, "min_ratio": 0.6, "max_ratio": 0.5},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="BlockMasks"):
        BlockMasks(settings.pop("grid"), **settings)


def test_more_masked_patches_than_the_bound_are_refused():
    with pytest.raises(ValueError, match="at most 3"):
        index_masks(torch.ones(1, 4, dtype=torch.bool), upper_bound=3)
