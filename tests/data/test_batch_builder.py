from __future__ import annotations

from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_fast.config import CropConfig, MaskConfig
from dinov2_fast.data.augmentation import MultiCrop
from dinov2_fast.data.batch_builder import BatchBuilder, Failure, substitute_indices
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.decoding import decode_image
from dinov2_fast.data.masking import BlockMasks
from dinov2_fast.data.sampler import sample_index
from dinov2_fast.data.seeding import CROPS, MASKS, derive_seed
from dinov2_fast.errors import DataError
from tests.data.pictures import write_folder
from tests.data.sources import Buggy, Pictures

CROPS_CONFIG = CropConfig(global_px=28, local_px=14, num_local=3)


def builder(source, **changes):
    settings = {
        "crops": CROPS_CONFIG,
        "masks": MaskConfig(),
        "patch_size": 7,
        "recipe": "official",
        "seed": 3,
        "batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "max_pixels": 10**6,
    }
    return BatchBuilder(source, **{**settings, **changes})


def test_a_batch_holds_the_crops_of_its_images_crop_major():
    source = Pictures(10)
    batch = builder(source).build(2)
    assert batch.global_crops.shape == (8, 3, 28, 28)
    assert batch.local_crops.shape == (12, 3, 14, 14)
    multi_crop = MultiCrop(CROPS_CONFIG)
    for row, position in enumerate(range(8, 12)):
        index = sample_index(3, position, 10)
        assert batch.sample_indices[row] == index
        image = decode_image(source.read(index))
        global_crops, local_crops = multi_crop(image, derive_seed(3, CROPS, position))
        for crop in range(2):
            assert torch.equal(batch.global_crops[4 * crop + row], global_crops[crop])
        for crop in range(3):
            assert torch.equal(batch.local_crops[4 * crop + row], local_crops[crop])


def test_masks_are_those_of_the_seed_step_and_rank():
    maker = BlockMasks((4, 4), num_crops=8)
    for step, rank in ((0, 0), (5, 0), (5, 1)):
        batch = builder(Pictures(10), rank=rank, world_size=2).build(step)
        assert torch.equal(batch.masks, maker(derive_seed(3, MASKS, step, rank)))
        assert batch.mask_indices.shape == (maker.upper_bound,)
        assert batch.num_masked == int(batch.masks.sum())
        assert batch.step == step


def test_a_global_batch_is_the_same_however_many_ranks_share_it():
    whole = builder(Pictures(10)).build(7)
    for world_size in (2, 4):
        size = 4 // world_size
        parts = [
            builder(Pictures(10), rank=rank, world_size=world_size, batch_size=size).build(7)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.sample_indices for part in parts]), whole.sample_indices)
        crops = torch.cat([part.global_crops.view(2, size, 3, 28, 28) for part in parts], 1)
        assert torch.equal(crops.flatten(0, 1), whole.global_crops)


def test_no_local_crops_and_batches_larger_than_the_data_work():
    crops = CropConfig(global_px=28, local_px=14, num_local=0)
    batch = builder(Pictures(3), crops=crops, batch_size=7).build(0)
    assert batch.local_crops.shape == (0, 3, 14, 14)
    assert sorted(batch.sample_indices.tolist()[:3]) == [0, 1, 2]


def test_unreadable_images_are_replaced_deterministically_and_reported(tmp_path):
    write_folder(tmp_path, 12)
    for index in (2, 7):
        path = tmp_path / f"{index:03}.png"
        path.write_bytes(path.read_bytes()[: 40 * index])
    source = open_images(tmp_path)
    batches = [builder(source).build(step) for step in range(6)]  # two passes over the data
    reported = [item for batch in batches for item in batch.unreadable]
    drawn = [sample_index(3, position, 12) for position in range(24)]
    used = torch.cat([batch.sample_indices for batch in batches]).tolist()
    assert {item.index for item in reported} == {2, 7}
    assert all(item.name.endswith(f"{item.index:03}.png") and item.reason for item in reported)
    for position, (wanted, got) in enumerate(zip(drawn, used, strict=True)):
        if wanted not in (2, 7):
            assert got == wanted
        else:
            tried = substitute_indices(3, position, 12)
            assert got == next(index for index in tried if index not in (2, 7))
    again = builder(source).build(3)
    assert torch.equal(again.sample_indices, batches[3].sample_indices)
    assert torch.equal(again.global_crops, batches[3].global_crops)
    assert again.unreadable == batches[3].unreadable


def test_a_bad_file_is_reported_once_per_draw_not_once_per_try(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "000.png").write_bytes(b"")
    batch = builder(open_images(tmp_path), batch_size=2).build(0)
    assert batch.sample_indices.tolist() == [1, 1]
    assert [item.index for item in batch.unreadable] == [0]
    assert batch.unreadable[0].reason == "empty file"


def test_data_without_any_readable_image_is_a_data_error(tmp_path):
    write_folder(tmp_path, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\x1b[31m")
    made = builder(open_images(tmp_path))
    with pytest.raises(DataError, match="2 images tried in its place are all unreadable"):
        made.build(0)
    failure = made[0]
    assert isinstance(failure, Failure)
    assert failure.error is DataError


def test_a_bug_comes_back_as_a_failure_with_its_traceback():
    failure = builder(Buggy(3))[0]
    assert isinstance(failure, Failure)
    assert failure.error is None
    assert "a bug in reading image" in failure.message
    assert "Traceback" in failure.message


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**62), st.integers(1, 60))
def test_substitutes_try_every_image_of_small_data(seed, position, num_images):
    tried = list(substitute_indices(seed, position, num_images))
    assert set(tried) == set(range(num_images))
    assert tried == list(substitute_indices(seed, position, num_images))


def test_substitutes_of_large_data_end_and_spread():
    tried = [list(substitute_indices(0, position, 10**9)) for position in range(50)]
    assert {len(one) for one in tried} == {1007}
    firsts = set(chain.from_iterable(islice(one, 8) for one in tried))
    assert len(firsts) == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 8}, "global_px must be a multiple of the patch size 8, got 28"),
        ({"patch_size": 28}, "local_px must be a multiple"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"rank": 1}, "0 <= rank < world_size"),
        ({"recipe": "other"}, "official, paper"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        builder(Pictures(3), **changes)
