"""Training dumps: wrappers, teacher and student, chunks of blocks, heads of both weight norms."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.errors import CheckpointError
from dinov2_fast.models.pretrained import (
    detect_format,
    from_official,
    head_to_official,
    head_to_parametrized,
    load_into,
    split_dump,
    to_official,
)
from dinov2_fast.nn import DINOHead
from tests.models.weights import states_equal, tiny_backbone


def backbone(depth: int = 5) -> dict[str, torch.Tensor]:
    return tiny_backbone("swiglu_reg", depth=depth).state_dict()


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def head() -> DINOHead:
    return DINOHead(64, 10, hidden_dim=12, bottleneck_dim=6)


def test_chunked_names_count_blocks_over_all_chunks():
    keys = from_official(backbone(), "dump", block_chunks=2)  # 5 // 2 blocks in a chunk

    names = sorted(key for key in keys if key.endswith("ls1.gamma"))
    assert names == [
        f"teacher.backbone.blocks.{name}.ls1.gamma" for name in ("0.0", "0.1", "1.2", "1.3", "2.4")
    ]


@pytest.mark.parametrize("block_chunks", [0, 1, 2, 4, 5, 9])
def test_a_dump_round_trips_bit_exactly(block_chunks):
    state = backbone()

    dump = from_official(state, "dump", block_chunks=block_chunks)

    assert detect_format(dump) == "dump"
    assert states_equal(to_official(dump), state)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "backbone.",
        "module.backbone.",
        "teacher.backbone.",
        "student.module.backbone._orig_mod.",
        "teacher.backbone._fsdp_wrapped_module.",
    ],
)
def test_wrappers_come_off(prefix):
    state = backbone()

    assert states_equal(to_official(prefixed(state, prefix)), state)


def test_chunks_without_any_prefix_are_a_dump():
    state = backbone()
    chunked = {
        key.removeprefix("teacher.backbone."): tensor
        for key, tensor in from_official(state, "dump").items()
    }

    assert detect_format(chunked) == "dump"
    assert states_equal(to_official(chunked), state)


def test_the_teacher_is_taken_before_the_student():
    student = backbone()
    teacher = {key: tensor + 1 for key, tensor in student.items()}
    checkpoint = prefixed(student, "student.backbone.") | prefixed(teacher, "teacher.backbone.")
    checkpoint |= {"dino_loss.center": torch.zeros(1), "optimizer.exp_avg.x": torch.zeros(1)}

    assert states_equal(to_official(checkpoint), teacher)


def test_heads_are_split_off_whichever_weight_norm_wrote_them():
    state, dino, ibot = backbone(), head().state_dict(), head().state_dict()
    dump = from_official(state, "dump")
    dump |= prefixed(dino, "teacher.dino_head.")
    dump |= prefixed(head_to_parametrized(ibot), "teacher.ibot_head.")

    parts = split_dump(dump)

    assert list(parts) == ["backbone", "dino_head", "ibot_head"]
    for part, expected in zip(parts.values(), (state, dino, ibot), strict=True):
        assert states_equal(part, expected)
    load_into(head(), parts["ibot_head"])


def test_parametrised_names_are_those_of_torch():
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 10, bias=False))
    theirs = prefixed(linear.state_dict(), "last_layer.")
    official = head_to_official(theirs)

    assert official["last_layer.weight_g"].shape == (10, 1)
    assert official["last_layer.weight_v"].shape == (10, 6)
    assert states_equal(head_to_parametrized(official), theirs)


def test_a_bare_backbone_has_no_heads():
    assert list(split_dump(backbone())) == ["backbone"]


@pytest.mark.parametrize(
    ("stranger", "listed"),
    [("ema.weight", "ema.weight"), ("teacher.gram_head.weight", "gram_head.weight")],
)
def test_unknown_parts_of_a_dump_are_listed(stranger, listed):
    dump = from_official(backbone(), "dump") | {stranger: torch.zeros(1)}

    with pytest.raises(CheckpointError, match=rf"unexpected \(1\): {listed}"):
        to_official(dump)


def test_block_numbers_within_chunks_are_refused():
    state = backbone()
    local = {}
    for key, tensor in state.items():
        local[key.replace("blocks.1.", "blocks.1.0.").replace("blocks.0.", "blocks.0.0.")] = tensor

    with pytest.raises(CheckpointError, match="numbers that count over all chunks"):
        to_official(local)


def test_two_tensors_under_one_name_are_refused():
    state = backbone()

    with pytest.raises(CheckpointError, match="one tensor for cls_token, got a second: module"):
        to_official({**state, "module.cls_token": state["cls_token"]})


def test_rejects_a_negative_number_of_chunks():
    with pytest.raises(ValueError, match="block_chunks >= 0, got -1"):
        from_official(backbone(), "dump", block_chunks=-1)
