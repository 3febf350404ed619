"""Images to patch tokens: order, sizes, messages."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.nn import PatchEmbed
from tests.inputs import randn


def test_patches_come_in_row_major_order():
    embed = PatchEmbed(patch_size=2, in_chans=1, embed_dim=1)
    torch.nn.init.constant_(embed.proj.weight, 0.25)
    torch.nn.init.zeros_(embed.proj.bias)
    image = torch.arange(6.0).view(1, 1, 2, 3)
    image = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # a 2 x 3 grid

    assert embed(image).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_equals_a_matrix_product_over_unfolded_patches():
    embed, image = PatchEmbed(patch_size=14, embed_dim=8).double(), randn(2, 3, 28, 42).double()
    patches = torch.nn.functional.unfold(image, 14, stride=14).transpose(1, 2)

    expected = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias

    torch.testing.assert_close(embed(image), expected, rtol=1e-12, atol=1e-12)


def test_keys():
    assert list(PatchEmbed().state_dict()) == ["proj.weight", "proj.bias"]


@pytest.mark.parametrize(
    ("size", "fitting"),
    [
        ((225, 224), "224 x 224"),
        ((224, 220), "224 x 224"),
        ((7, 29), "14 x 28"),
        ((0, 14), "14 x 14"),
    ],
)
def test_other_sizes_name_the_nearest_that_fit(size, fitting):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]}; resize or pad to {fitting}"):
        PatchEmbed(patch_size=14)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 4, 28, 28), (1, 28, 28, 3)])
def test_refuses_what_is_no_batch_of_images(shape):
    with pytest.raises(ValueError, match=r"patch_embed: expected images \[B, 3, H, W\]"):
        PatchEmbed()(torch.zeros(shape))
