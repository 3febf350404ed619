from __future__ import annotations

import math
import pickle
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinov2_fast.config import CropConfig
from dinov2_fast.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropDraw,
    CropRenderer,
    Jitter,
    MultiCrop,
    draw_box,
    evaluation_transform,
)
from tests.data.pictures import picture

SMALL = CropConfig(global_px=28, local_px=14, num_local=3)
NUM_DRAWS = 3000


def assert_rate(count, number, probability):
    """Within 5 standard deviations of a binomial; exact for 0 and 1."""
    slack = 5 * math.sqrt(number * probability * (1 - probability))
    assert abs(count - number * probability) <= slack, (count, number, probability)


def levels(crop):
    """A normalised crop back in 0..255, fp64 [3, H, W]."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in CONSTANTS)
    return (crop.double() * std + mean) * 255


CONSTANTS = (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("recipe", "blur", "rates"),
    [
        ("official", "recipe", (0.0, 0.9, 0.5)),
        ("paper", "recipe", (1.0, 0.1, 0.5)),
        ("official", "paper", (1.0, 0.1, 0.5)),
        ("paper", "official", (0.0, 0.9, 0.5)),
    ],
)
def test_every_operation_happens_as_often_as_the_recipe_says(recipe, blur, rates):
    multi_crop = MultiCrop(CropConfig(num_local=2, blur=blur), recipe)
    draws = [multi_crop.draw((500, 375), seed) for seed in range(NUM_DRAWS)]
    crops = {
        "global 1": [draw[0] for draw in draws],
        "global 2": [draw[1] for draw in draws],
        "local": [crop for draw in draws for crop in draw[2:]],
    }
    for (name, drawn), blur_rate in zip(crops.items(), rates, strict=True):
        number = len(drawn)
        assert_rate(sum(crop.flip for crop in drawn), number, 0.5)
        assert_rate(sum(crop.jitter is not None for crop in drawn), number, 0.8)
        assert_rate(sum(crop.gray for crop in drawn), number, 0.2)
        assert_rate(sum(crop.sigma is not None for crop in drawn), number, blur_rate)
        solarize_rate = 0.2 if name == "global 2" else 0.0
        assert_rate(sum(crop.solarize for crop in drawn), number, solarize_rate)


def test_global_and_local_crops_cover_the_shares_of_their_own_scale():
    multi_crop = MultiCrop(CropConfig(num_local=2))
    draws = [multi_crop.draw((500, 500), seed) for seed in range(500)]
    for drawn, (low, high) in (
        ([draw[0] for draw in draws], (0.32, 1.0)),
        ([draw[1] for draw in draws], (0.32, 1.0)),
        ([crop for draw in draws for crop in draw[2:]], (0.05, 0.32)),
    ):
        boxes = np.array([crop.box for crop in drawn])
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / 500**2
        # Sides are rounded to pixels; misfits make large areas rarer than small ones.
        assert low - 0.01 < areas.min() < low + 0.1 * (high - low)
        assert high - 0.15 * (high - low) < areas.max() < high + 0.01


def test_operations_are_drawn_independently_of_each_other():
    multi_crop = MultiCrop(CropConfig(num_local=0))
    drawn = [multi_crop.draw((500, 375), seed)[1] for seed in range(NUM_DRAWS)]
    flags = {
        "flip": [crop.flip for crop in drawn],
        "jitter": [crop.jitter is not None for crop in drawn],
        "gray": [crop.gray for crop in drawn],
        "blur": [crop.sigma is not None for crop in drawn],
        "solarize": [crop.solarize for crop in drawn],
    }
    names = list(flags)
    correlations = np.corrcoef(np.array([flags[name] for name in names], np.float64))
    assert np.abs(correlations - np.eye(len(names))).max() < 5 / math.sqrt(NUM_DRAWS)


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov: the largest gap stays below 2.2 / sqrt(n) but once in 10^4."""
    ordered = np.sort(values)
    assert low <= ordered[0]
    assert ordered[-1] <= high
    expected = (ordered - low) / (high - low)
    gap = np.abs(expected - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert gap < 2.2 / math.sqrt(len(ordered))


def test_factors_are_uniform_in_their_ranges_and_orders_equally_likely():
    multi_crop = MultiCrop(CropConfig(num_local=0))
    drawn = [crop for seed in range(NUM_DRAWS) for crop in multi_crop.draw((64, 64), seed)]
    jitters = [crop.jitter for crop in drawn if crop.jitter is not None]
    assert_uniform([jitter.brightness for jitter in jitters], 0.6, 1.4)
    assert_uniform([jitter.contrast for jitter in jitters], 0.6, 1.4)
    assert_uniform([jitter.saturation for jitter in jitters], 0.8, 1.2)
    assert_uniform([jitter.hue for jitter in jitters], -0.1, 0.1)
    assert_uniform([crop.sigma for crop in drawn if crop.sigma is not None], 0.1, 2.0)
    orders = Counter(jitter.order for jitter in jitters)
    assert len(orders) == 24
    for count in orders.values():
        assert_rate(count, len(jitters), 1 / 24)


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_drawn_like_torchvisions(scale):
    from torchvision.transforms.v2 import RandomResizedCrop

    def statistics(boxes):
        areas = [w * h / (500 * 375) for _, _, w, h in boxes]
        aspects = [math.log(w / h) for _, _, w, h in boxes]
        centers = [(left + w / 2) / 500 for left, _, w, _ in boxes]
        return np.sort(np.array([areas, aspects, centers]), axis=1)

    rng = Random(0)
    ours = [draw_box(rng, 500, 375, scale) for _ in range(NUM_DRAWS)]
    ours = statistics([(a, b, c - a, d - b) for a, b, c, d in ours])
    theirs = RandomResizedCrop(10, scale=scale)
    drawn = [theirs.make_params([torch.empty(3, 375, 500)]) for _ in range(NUM_DRAWS)]
    theirs = statistics([(d["left"], d["top"], d["width"], d["height"]) for d in drawn])
    # Two-sample Kolmogorov-Smirnov on area, aspect ratio and place.
    for a, b in zip(ours, theirs, strict=True):
        both = np.concatenate([a, b])
        gap = np.abs(
            np.searchsorted(a, both, side="right") - np.searchsorted(b, both, side="right")
        )
        assert gap.max() / NUM_DRAWS < 2.2 * math.sqrt(2 / NUM_DRAWS)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.integers(0, 2**64 - 1),
)
def test_boxes_lie_inside_of_images_of_any_shape(width, height, scale, seed):
    left, top, right, bottom = draw_box(Random(seed), width, height, tuple(scale))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(
    ("size", "box"), [((1, 20000), (0, 9999, 1, 10000)), ((4000, 30), (1980, 0, 2020, 30))]
)
def test_extreme_shapes_fall_back_to_the_central_rectangle(size, box):
    assert draw_box(Random(0), *size, (0.9, 1.0)) == box


def torchvision_crop(image, draw, px):
    """The same draw rendered by torchvision's functional operations, uint8 [3, H, W]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    left, top, right, bottom = draw.box
    crop = F.resized_crop(
        image,
        top,
        left,
        bottom - top,
        right - left,
        [px, px],
        InterpolationMode.BICUBIC,
    )
    if draw.flip:
        crop = F.horizontal_flip(crop)
    if draw.jitter is not None:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for operation in draw.jitter.order:
            crop = adjust[operation](crop, draw.jitter[1 + operation])
    if draw.gray:
        crop = F.rgb_to_grayscale(crop, num_output_channels=3)
    if draw.sigma is not None:
        crop = F.gaussian_blur(crop, [9, 9], [draw.sigma, draw.sigma])
    if draw.solarize:
        crop = F.solarize(crop, 128)
    return F.pil_to_tensor(crop)


@pytest.mark.parametrize("px", [14, 33, 98])
def test_crops_equal_torchvisions_bit_for_bit_without_blur(px):
    config = CropConfig(global_px=px, local_px=px, num_local=4)
    multi_crop, renderer = MultiCrop(config), CropRenderer(px)
    out = np.empty((3, px, px), np.float32)
    compared = Counter()
    for seed in range(60):
        image = picture(120, 90, seed=seed)
        for draw in multi_crop.draw(image.size, seed):
            draw = draw._replace(sigma=None)
            renderer(image, draw, out)
            expected = torchvision_crop(image, draw, px)
            restored = levels(torch.from_numpy(out))
            assert (restored - expected).abs().max() < 1e-3
            compared.update(jitter=draw.jitter is not None, gray=draw.gray, solarize=draw.solarize)
    assert min(compared.values()) >= 5, compared


@pytest.mark.parametrize("px", [14, 33, 98])
@pytest.mark.parametrize("gray", [False, True])
def test_blur_equals_torchvisions_up_to_rounding_ties(px, gray):
    renderer, out = CropRenderer(px), np.empty((3, px, px), np.float32)
    noise = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    different = 0
    sigmas = (0.1, 0.2, 0.35, 0.7, 1.0, 1.5, 2.0)
    for sigma in sigmas:
        draw = CropDraw((5, 5, 75, 65), False, None, gray, sigma, False)
        renderer(image, draw, out)
        gap = (levels(torch.from_numpy(out)) - torchvision_crop(image, draw, px)).abs()
        assert gap.max() < 1.001  # one level, where the exact value lies half-way between two
        different += int((gap > 0.5).sum())
    assert different <= 1e-3 * len(sigmas) * out.size


def test_solarize_inverts_what_is_at_least_128():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    out = np.empty((3, 16, 16), np.float32)
    CropRenderer(16)(ramp, CropDraw((0, 0, 16, 16), False, None, False, None, True), out)
    restored = levels(torch.from_numpy(out)).round().long().flatten(1)
    expected = torch.tensor([value if value < 128 else 255 - value for value in range(256)])
    assert torch.equal(restored, expected.expand(3, 256))


def test_crops_are_normalised_with_the_imagenet_constants():
    white = Image.new("RGB", (20, 20), "white")
    out = np.empty((3, 14, 14), np.float32)
    CropRenderer(14)(white, CropDraw((0, 0, 20, 20), False, None, False, None, False), out)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert out[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert np.ptp(out, axis=(1, 2)).max() == 0


def test_a_seed_decides_the_crops_whatever_was_drawn_before():
    image, other = picture(64, 64), picture(50, 80, seed=1)
    multi_crop = MultiCrop(SMALL)
    first_global, first_local = multi_crop(image, 1)
    multi_crop(other, 2)
    again_global, again_local = pickle.loads(pickle.dumps(multi_crop))(image, 1)
    assert all(map(torch.equal, first_global, again_global))
    assert all(map(torch.equal, first_local, again_local))
    assert not torch.equal(multi_crop(image, 3)[0][0], first_global[0])


def test_global_random_state_is_neither_read_nor_changed():
    image, multi_crop = picture(64, 64), MultiCrop(SMALL)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = multi_crop(image, 1)[0][0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(99)
    assert torch.equal(multi_crop(image, 1)[0][0], first)


def test_more_local_crops_leave_the_others_as_they_are():
    image = picture(64, 64)
    few = MultiCrop(CropConfig(global_px=28, local_px=14, num_local=1))(image, 1)
    many = MultiCrop(CropConfig(global_px=28, local_px=14, num_local=5))(image, 1)
    assert all(map(torch.equal, few[0], many[0]))
    assert torch.equal(few[1][0], many[1][0])


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 7)])
@pytest.mark.parametrize("num_local", [0, 3])
def test_shapes_and_types_hold_for_images_of_any_shape(size, num_local):
    config = CropConfig(global_px=28, local_px=14, num_local=num_local)
    global_crops, local_crops = MultiCrop(config)(Image.new("RGB", size, "red"), 0)
    assert [tuple(crop.shape) for crop in global_crops] == [(3, 28, 28)] * 2
    assert [tuple(crop.shape) for crop in local_crops] == [(3, 14, 14)] * num_local
    assert all(crop.dtype == torch.float32 for crop in [*global_crops, *local_crops])
    assert all(crop.isfinite().all() for crop in [*global_crops, *local_crops])


def test_global_and_local_crops_may_have_one_size():
    config = CropConfig(global_px=14, local_px=14, num_local=2)
    global_crops, local_crops = MultiCrop(config)(picture(), 0)
    assert len({crop.numpy().tobytes() for crop in [*global_crops, *local_crops]}) == 4


def test_strength_zero_leaves_an_operation_out():
    config = CropConfig(brightness=0.0, hue=0.0, num_local=0)
    jitters = [MultiCrop(config).draw((64, 64), seed)[0].jitter for seed in range(20)]
    drawn = [jitter for jitter in jitters if jitter is not None]
    assert drawn
    assert all(jitter.brightness is None and jitter.hue is None for jitter in drawn)
    image, out = picture(14, 14), np.empty((3, 14, 14), np.float32)
    nothing = Jitter((0, 1, 2, 3), None, None, None, None)
    CropRenderer(14)(image, CropDraw((0, 0, 14, 14), False, nothing, False, None, False), out)
    restored = levels(torch.from_numpy(out)).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(restored, np.asarray(image))


def test_unknown_recipes_and_tiny_crops_are_refused():
    with pytest.raises(ValueError, match="official, paper"):
        MultiCrop(SMALL, "nonsense")
    with pytest.raises(ValueError, match="larger than 4"):
        MultiCrop(CropConfig(local_px=4))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (97, 331), (2000, 300)])
@pytest.mark.parametrize(("image_px", "resize_px"), [(224, 256), (98, 98)])
def test_evaluation_transform_equals_torchvisions(size, image_px, resize_px):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    image = picture(*size)
    crop = evaluation_transform(image_px, resize_px)(image)
    assert (tuple(crop.shape), crop.dtype) == ((3, image_px, image_px), torch.float32)
    expected = F.center_crop(
        F.resize(image, [resize_px], InterpolationMode.BICUBIC), [image_px, image_px]
    )
    assert (levels(crop) - F.pil_to_tensor(expected)).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(20, 3000), (3000, 20)])
def test_evaluation_transform_shows_the_centre_of_a_strip(size):
    # Dark but for a bright third of the crop in the middle of the long side.
    pixels = np.zeros((max(size), 20, 3), np.uint8)
    pixels[1497:1503] = 255
    image = Image.fromarray(pixels if size[1] > size[0] else pixels.transpose(1, 0, 2).copy())
    crop = levels(evaluation_transform(20, 20)(image)).mean(0)
    profile = crop.mean(1) if size[1] > size[0] else crop.mean(0)
    assert float(profile[7:13].min()) > 200
    assert float(torch.cat([profile[:5], profile[15:]]).max()) < 30


def test_evaluation_transform_of_a_strip_stays_small_and_survives_pickling():
    transform = pickle.loads(pickle.dumps(evaluation_transform(224, 256)))
    assert transform(Image.new("RGB", (1, 20000), "red")).shape == (3, 224, 224)
    with pytest.raises(ValueError, match="image_px <= resize_px"):
        evaluation_transform(256, 224)
