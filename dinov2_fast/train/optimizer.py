"""AdamW with DINOv2's multipliers, clipping per sub-network and the teacher's moving average.

One call of the `optimizer` op per parameter group reads and writes weights, moments and teacher
in a single pass; the flag that skips a broken step stays on the device, so nothing waits for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dinov2_fast.config import OptimizerConfig
from dinov2_fast.distributed import all_reduce_max
from dinov2_fast.errors import CheckpointError
from dinov2_fast.ops._matmul import LowPrecisionCopy, has_fast_bfloat16
from dinov2_fast.ops.optimizer import adamw_ema_step, clip_coefficient, gradient_norm
from dinov2_fast.train.schedules import StepValues, scaled_lr
from dinov2_fast.train.student_teacher import StudentTeacher

EMBEDDINGS = ("pos_embed", "patch_embed", "cls_token", "mask_token", "register_tokens")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share every multiplier."""

    sub_network: str
    """backbone, dino_head or ibot_head: what gradients are clipped by."""
    lr_multiplier: float
    """Factor on the step's learning rate."""
    decays: bool
    """Whether the step's weight decay applies."""
    is_last_layer: bool
    """Whether these are prototypes, which stay frozen at first."""
    names: tuple[str, ...]
    """Names in the student, with the sub-network in front."""


def layer_id(name: str, *, depth: int) -> int:
    """Height of a backbone parameter: 0 for what makes tokens, i + 1 for block i, then the norm.

    Args:
        name: official name without a prefix.
        depth: number of blocks.
    """
    if name.startswith(EMBEDDINGS):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else depth + 1


def parameter_groups(
    student: Mapping[str, nn.Module] | nn.ModuleDict, config: OptimizerConfig, *, depth: int
) -> list[ParameterGroup]:
    """Multipliers of every parameter, equal ones gathered.

    The backbone's learning rate falls by `layer_decay` per block from the top, and once more by
    `patch_embed_lr_multiplier` in the patch embedding. Biases, norms and LayerScale do not decay;
    position embeddings, tokens and both parts of the prototypes' weight do.

    Args:
        student: sub-networks by name.
        config: the multipliers.
        depth: blocks of the backbone.
    Returns:
        Groups in the order in which their first parameters stand in the networks.
    Source: DINOv2 training code.
    """
    members: dict[tuple[str, float, bool, bool], list[str]] = {}
    for sub_network, module in student.items():
        for name, _ in module.named_parameters():
            multiplier = 1.0
            if sub_network == "backbone":
                multiplier = config.layer_decay ** (depth + 1 - layer_id(name, depth=depth))
            if name.startswith("patch_embed"):
                multiplier *= config.patch_embed_lr_multiplier
            decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
            key = (sub_network, multiplier, decays, "last_layer" in name)
            members.setdefault(key, []).append(f"{sub_network}.{name}")
    return [ParameterGroup(*key, tuple(names)) for key, names in members.items()]


class PretrainingOptimizer:
    """Updates student and teacher of one pair; holds the moments and the number of steps.

    Args:
        pair: the networks; `step` changes their parameters in place.
        config: AdamW's constants, clipping and multipliers.
        global_batch_size: images per step over all processes.
    """

    def __init__(
        self, pair: StudentTeacher, config: OptimizerConfig, *, global_batch_size: int
    ) -> None:
        self.config = config
        self.peak_lr = scaled_lr(config, global_batch_size=global_batch_size)
        self.groups = parameter_groups(pair.student, config, depth=pair.student.backbone.depth)
        self._parameters = dict(pair.student.named_parameters())
        self._teacher = dict(pair.teacher.named_parameters())
        self._exp_avg = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._exp_avg_sq = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._copies = _low_precision_copies(pair)
        self._num_steps = 0

    def zero_gradients(self) -> None:
        """Drop the gradients; their memory is free until the next backward pass."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, values: StepValues, *, skip: Tensor | None = None) -> dict[str, Tensor]:
        """Clip, update the student with AdamW, move the teacher after it.

        With a gradient that is not finite, or on any process's wish, nothing changes: neither
        weights nor moments nor teacher. Nothing here waits for the device, so the host does not
        know of it: the step still counts in AdamW's bias correction.

        Args:
            values: learning rate, weight decay and momentum of this step.
            skip: 0-d bool, whether this process wants the step left out, for instance because its
                loss is not finite; None never wants it.
        Returns:
            0-d tensors on the device: `gradient_norm_<sub-network>` before clipping, and
            `skipped`, the same on every process.
        Raises:
            ValueError: no parameter has a gradient.
        """
        norms = {name: gradient_norm(grads) for name, grads in self._gradients_by_network()}
        if not norms:
            raise ValueError("optimizer: expected gradients, got none; call backward() first")
        self._num_steps += 1
        broken = torch.stack([~norm.isfinite() for norm in norms.values()]).any()
        if skip is not None:
            broken = broken | skip
        skipped = all_reduce_max(broken.float()) > 0
        scales = {name: self._clip_scale(norm) for name, norm in norms.items()}
        for group in self.groups:
            names = [name for name in group.names if self._parameters[name].grad is not None]
            lr = values.lr * group.lr_multiplier
            copies = [self._copies.get(name) for name in names]
            adamw_ema_step(
                [self._parameters[name] for name in names],
                [self._gradient(name) for name in names],
                [self._exp_avg[name] for name in names],
                [self._exp_avg_sq[name] for name in names],
                [self._teacher[name] for name in names],
                lr=lr * values.last_layer_lr_factor if group.is_last_layer else lr,
                weight_decay=values.weight_decay if group.decays else 0.0,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                step=self._num_steps,
                momentum=values.momentum,
                gradient_scale=scales.get(group.sub_network, 1.0),
                skip=skipped,
                copies=[None if pair is None else pair[0].tensor for pair in copies],
                ema_copies=[None if pair is None else pair[1].tensor for pair in copies],
            )
        if self._copies and not skipped:  # only on the CPU are there any: nothing to wait for
            self._note_copies()
        named_norms = {f"gradient_norm_{name}": norm for name, norm in norms.items()}
        return {**named_norms, "skipped": skipped}

    def state_dict(self) -> dict[str, Tensor]:
        """Number of steps and moments by plain names; the moments are the live tensors."""
        return {
            "num_steps": torch.tensor(self._num_steps),
            **{f"exp_avg.{name}": value for name, value in self._exp_avg.items()},
            **{f"exp_avg_sq.{name}": value for name, value in self._exp_avg_sq.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state into this one.

        Args:
            state: what `state_dict` gave for the same networks, on any device.
        Raises:
            CheckpointError: names or shapes differ; nothing is copied then.
        """
        own = self.state_dict()
        names = sorted(own.keys() ^ state.keys())
        names += [name for name in own if name in state and own[name].shape != state[name].shape]
        if names:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise CheckpointError(
                f"optimizer: expected the {len(own)} tensors of these networks, got {len(state)} "
                f"of which {len(names)} are missing, unknown or of another shape: {listed}; "
                "resume with the configuration that wrote the checkpoint"
            )
        for name, value in own.items():
            value.copy_(state[name])
        self._num_steps = int(state["num_steps"])

    def _gradients_by_network(self) -> list[tuple[str, list[Tensor]]]:
        """The gradients of each sub-network that has any."""
        networks: dict[str, list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                networks.setdefault(name.split(".", 1)[0], []).append(parameter.grad)
        return list(networks.items())

    def _note_copies(self) -> None:
        """Say of the copies that the step has just written that they are current."""
        for name, copies in self._copies.items():
            weights = self._parameters[name], self._teacher[name]
            if weights[0].grad is not None:
                for copy, weight in zip(copies, weights, strict=True):
                    copy.mark_written(weight)

    def _gradient(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None
        return gradient

    def _clip_scale(self, norm: Tensor) -> Tensor | float:
        """What gradients of this norm are multiplied by."""
        return clip_coefficient(norm, self.config.clip_norm) if self.config.clip_norm > 0 else 1.0


def _low_precision_copies(
    pair: StudentTeacher,
) -> dict[str, tuple[LowPrecisionCopy, LowPrecisionCopy]]:
    """Copies of student's and teacher's weights in bf16, where products take them; by name."""
    device = next(pair.student.parameters()).device
    if pair.student.precision != "bf16" or device.type != "cpu" or not has_fast_bfloat16():
        return {}
    teacher = dict(pair.teacher.named_modules())
    return {
        f"{name}.weight": (
            LowPrecisionCopy(module.weight, torch.bfloat16),
            LowPrecisionCopy(cast("nn.Linear", teacher[name]).weight, torch.bfloat16),
        )
        for name, module in pair.student.named_modules()
        if isinstance(module, nn.Linear)
    }


def build_optimizer(
    pair: StudentTeacher, optimizer: OptimizerConfig, *, global_batch_size: int
) -> PretrainingOptimizer:
    """The optimizer of a run, without any update made.

    Args:
        pair: the networks.
        optimizer: AdamW's constants, clipping and multipliers.
        global_batch_size: images per step over all processes; scales the learning rate.
    """
    return PretrainingOptimizer(pair, optimizer, global_batch_size=global_batch_size)
