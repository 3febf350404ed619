"""One whole training step in the order in which iBOT's training loop takes it."""

from __future__ import annotations

import contextlib
import copy
from typing import Literal

import torch
from torch import Tensor, nn

from dinov2_fast.bench.eager.head import Head
from dinov2_fast.bench.eager.objective import EagerObjective
from dinov2_fast.bench.eager.vision_transformer import VisionTransformer
from dinov2_fast.config import CropConfig, LossConfig, ModelConfig, OptimizerConfig
from dinov2_fast.data.collate import Batch
from dinov2_fast.errors import ConfigError
from dinov2_fast.models.presets import architecture
from dinov2_fast.train.schedules import StepValues


class EagerNetwork(nn.Module):
    """A backbone and the one head that CLS and patches share.

    Args:
        model: of the backbone; registers are not part of this reference.
        loss: of the head.
        crops: the side of the global crops sets the stored positions.
        drop_ratio: of the residual branches.
    Raises:
        ConfigError: a model that this reference does not have.
    """

    def __init__(
        self, model: ModelConfig, loss: LossConfig, crops: CropConfig, *, drop_ratio: float
    ) -> None:
        super().__init__()
        preset = architecture(model.arch)
        if preset.num_registers or loss.separate_ibot_head or loss.dino_head.num_layers != 3:
            raise ConfigError(
                "bench: the eager reference has no registers, one shared head and 3 head layers, "
                f"got {model.arch}, separate_ibot_head {loss.separate_ibot_head} and "
                f"{loss.dino_head.num_layers} layers"
            )
        dim = model.embed_dim or preset.embed_dim
        self.backbone = VisionTransformer(
            image_px=crops.global_px,
            patch_size=model.patch_size or preset.patch_size,
            dim=dim,
            depth=model.depth or preset.depth,
            num_heads=model.num_heads or preset.num_heads,
            ffn=model.ffn or preset.ffn,
            drop_ratio=drop_ratio,
            layer_scale=model.layer_scale,
        )
        head = loss.dino_head
        self.dino_head = Head(
            dim,
            head.num_prototypes,
            hidden_dim=head.hidden_dim,
            bottleneck_dim=head.bottleneck_dim,
        )

    def forward(self, crops: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of CLS [B, K] and all patches [B, N, K], and CLS features [B, C]."""
        tokens = self.backbone(crops, masks)
        return *self.dino_head(tokens), tokens[:, 0]


class EagerStep:
    """Networks, objective and optimizer; calling it takes one step.

    Args:
        model: the backbone.
        loss: the head and the temperatures; centering is by softmax whatever it says.
        crops: sides of the crops.
        optimizer: AdamW's constants and the clipping norm.
        precision: bf16 runs networks and losses under autocast.
        device: where the networks go.
    """

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        crops: CropConfig,
        optimizer: OptimizerConfig,
        *,
        precision: Literal["fp32", "bf16"],
        device: torch.device | str,
    ) -> None:
        self.precision: Literal["fp32", "bf16"] = precision
        self.device = torch.device(device)
        self.clip_norm = optimizer.clip_norm
        network = EagerNetwork(model, loss, crops, drop_ratio=model.drop_ratio)
        self.student = network.to(self.device).train()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.objective = EagerObjective(
            loss.dino_head.num_prototypes,
            student_temperature=loss.student_temperature,
            center_momentum=loss.center_momentum,
            koleo_weight=loss.koleo_weight,
        ).to(self.device)
        decayed = [p for p in self.student.parameters() if p.ndim > 1]
        others = [p for p in self.student.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            foreach=True,
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Start student and teacher from a student's state dict of the package."""
        self.student.load_state_dict(state)
        self.teacher.load_state_dict(state)

    def losses(self, batch: Batch, *, teacher_temperature: float) -> dict[str, Tensor]:
        """Forward passes of both networks: one a resolution, heads on every token."""
        with self._autocast():
            with torch.no_grad():
                teacher_cls, teacher_patches, _ = self.teacher(batch.global_crops)
            cls, patches, features = self.student(batch.global_crops, batch.masks)
            if len(batch.local_crops):
                cls = torch.cat((cls, self.student(batch.local_crops)[0]))
            return self.objective(
                cls,
                patches,
                teacher_cls,
                teacher_patches,
                batch.masks,
                features,
                teacher_temperature=teacher_temperature,
            )

    def __call__(self, batch: Batch, values: StepValues) -> dict[str, Tensor]:
        """One step: losses, gradients, clipping, AdamW, then the teacher a parameter at a time."""
        losses = self.losses(batch, teacher_temperature=values.teacher_temperature)
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
        self.optimizer.param_groups[0]["weight_decay"] = values.weight_decay
        self.optimizer.zero_grad()
        losses["total"].backward()
        if self.clip_norm > 0:
            for network in self.student.children():
                nn.utils.clip_grad_norm_(network.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for parameter, average in pairs:
                average.mul_(values.momentum).add_((1 - values.momentum) * parameter)
        return {name: value.detach() for name, value in losses.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
