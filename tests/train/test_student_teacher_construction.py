"""The student/teacher pair: how it is built, wrapped, stored and exported."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dinov2_fast.config import CropConfig, HeadConfig, LossConfig, ModelConfig
from dinov2_fast.errors import ConfigError
from dinov2_fast.models.presets import create_model
from dinov2_fast.train.student_teacher import (
    LOSS_NAMES,
    StudentTeacher,
    build_student_teacher,
    teacher_state_official,
)
from tests.train.batches import (
    CROPS,
    HEAD,
    MODEL,
    SEPARATE,
    SHARED,
    build_pair,
    synthetic_batch,
    targets_and_losses,
)

LOSSES = {"shared": SHARED, "separate": SEPARATE}


@pytest.fixture(params=sorted(LOSSES))
def loss(request) -> LossConfig:
    return LOSSES[request.param]


def fresh_pair(seed: int = 0, **options) -> StudentTeacher:
    return build_student_teacher(
        MODEL, SEPARATE, CROPS, recipe="official", seed=seed, device="cpu", **options
    )


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(7)
    expected_draw = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = fresh_pair(3).state_dict(), fresh_pair(3).state_dict(), fresh_pair(4)
    assert torch.equal(torch.rand(3), expected_draw)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["student.backbone.pos_embed"], other.student.backbone.pos_embed)


def test_teacher_starts_as_a_copy_without_shared_memory():
    pair = fresh_pair()
    teacher = pair.teacher.state_dict()
    for name, value in pair.student.state_dict().items():
        assert torch.equal(value, teacher[name])
        assert value.data_ptr() != teacher[name].data_ptr()


def test_teacher_takes_no_gradient_and_stays_in_evaluation_mode():
    pair = build_pair(SEPARATE, model=dataclasses.replace(MODEL, drop_ratio=0.5))
    _, losses = targets_and_losses(pair.train(), synthetic_batch())
    losses["total"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in pair.teacher.parameters())
    assert pair.student.training
    assert not any(module.training for module in pair.teacher.modules())
    assert not pair.eval().student.training


def test_every_student_parameter_receives_a_gradient(loss):
    # DistributedDataParallel waits for all of them.
    pair = build_pair(loss)
    _, losses = targets_and_losses(pair, synthetic_batch())
    losses["total"].backward()
    without = [name for name, p in pair.student.named_parameters() if p.grad is None]
    assert without == []
    # It stands in for masked patches only, so it shows that the masks reached the backbone.
    assert pair.student.backbone.mask_token.grad.abs().max() > 0


@pytest.mark.parametrize(
    "loss", [SEPARATE, dataclasses.replace(SEPARATE, centering="softmax_centering")]
)
def test_state_dict_names_every_tensor_once(loss):
    pair = build_pair(loss)
    names = list(pair.state_dict())
    assert {name.split(".")[0] for name in names} <= {"student", "teacher", "centering"}
    assert sum(name.endswith("pos_embed") for name in names) == 2
    centers = [name for name in names if name.startswith("centering")]
    expected = ["centering.dino.center", "centering.ibot.center"]
    assert centers == (expected if loss.centering == "softmax_centering" else [])


def test_wrapping_the_student_changes_what_is_called_but_no_name():
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments):
            calls.append(len(arguments))
            return self.module(*arguments)

    pair, batch = build_pair(), synthetic_batch()
    names = list(pair.state_dict())
    _, plain = targets_and_losses(pair, batch)
    pair.wrap_student(Wrapper)
    _, wrapped = targets_and_losses(pair, batch)
    assert calls == [3]
    assert list(pair.state_dict()) == names
    assert all(torch.equal(plain[name], wrapped[name]) for name in LOSS_NAMES)


def test_distributed_data_parallel_can_wrap_the_student(tmp_path):
    pair, plain_pair, batch = build_pair(SEPARATE), build_pair(SEPARATE), synthetic_batch()
    targets_and_losses(plain_pair, batch)[1]["total"].backward()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        pair.wrap_student(nn.parallel.DistributedDataParallel)
        for _ in range(2):  # the second pass fails if the first left a parameter without gradient
            pair.zero_grad()
            targets_and_losses(pair, batch)[1]["total"].backward()
    finally:
        torch.distributed.destroy_process_group()
    plain = dict(plain_pair.student.named_parameters())
    for name, parameter in pair.student.named_parameters():
        assert torch.equal(parameter.grad, plain[name].grad), name


def test_meta_construction_of_the_largest_preset_stores_nothing():
    head = HeadConfig(num_prototypes=131072)
    pair = build_student_teacher(
        ModelConfig(arch="vitg14"),
        LossConfig(dino_head=head),
        CropConfig(),
        recipe="official",
        seed=0,
        device="meta",
    )
    assert all(parameter.is_meta for parameter in pair.parameters())
    # 1,136,480,768 at 37 x 37 patches; here 16 x 16.
    backbone = sum(p.numel() for p in pair.student.backbone.parameters())
    assert backbone == 1_136_480_768 - (37**2 - 16**2) * 1536


def test_an_objective_without_cross_entropy_is_refused():
    nothing = dataclasses.replace(SHARED, dino_weight=0.0, ibot_weight=0.0)
    with pytest.raises(ConfigError, match=r"loss\.dino_weight or loss\.ibot_weight"):
        build_pair(nothing)


def test_teacher_is_exported_under_published_names():
    pair = build_pair(SEPARATE)
    state = teacher_state_official(pair)
    hub = create_model("debug", image_px=CROPS.global_px)
    assert list(state) == list(hub.state_dict())
    hub.load_state_dict(state, strict=True)
    image = synthetic_batch().global_crops
    assert torch.equal(hub.eval()(image), pair.teacher.backbone(image))


def test_teacher_with_heads_is_exported_under_the_names_of_a_training_dump():
    state = teacher_state_official(build_pair(SEPARATE), heads=True)
    heads = {name for name in state if not name.startswith("backbone.")}
    assert heads == {
        f"{head}.{part}"
        for head in ("dino_head", "ibot_head")
        for part in (
            *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
            "last_layer.weight_g",
            "last_layer.weight_v",
        )
    }
    assert state["dino_head.last_layer.weight_g"].shape == (HEAD.num_prototypes, 1)
    assert all(
        value.dtype == torch.float32 and value.device.type == "cpu" for value in state.values()
    )
