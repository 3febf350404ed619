"""The only place where student and teacher meet: networks, targets, losses of one step.

The teacher's moving average is taken inside the optimizer step (`train/optimizer.py`), in the same
pass over memory as AdamW; nothing else ever writes the teacher.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dinov2_fast.backends import choose_backend
from dinov2_fast.config import CropConfig, LossConfig, ModelConfig
from dinov2_fast.errors import ConfigError
from dinov2_fast.losses.dino import dino_loss, dino_prototype_loss
from dinov2_fast.losses.ibot import ibot_loss, ibot_prototype_loss
from dinov2_fast.losses.koleo import koleo_loss
from dinov2_fast.losses.targets import SoftTargets, build_centering
from dinov2_fast.models.presets import ARCHITECTURES, create_model
from dinov2_fast.models.vision_transformer import VisionTransformer
from dinov2_fast.nn.head import DINOHead

if TYPE_CHECKING:
    from dinov2_fast.data.collate import Batch

LOSS_NAMES = ("dino_global", "dino_local", "ibot", "koleo", "total")


@dataclass(frozen=True)
class Targets:
    """What the teacher says about one batch; `None` where the loss has no such term."""

    dino: SoftTargets | None
    """[2B, K] for the global crops, first crops of all images first."""
    ibot: SoftTargets | None
    """[M, K] for the masked patches, padding removed."""


class SubNetworks(nn.ModuleDict):
    """`backbone`, `dino_head` and `ibot_head`, the latter two only where they exist."""

    backbone: VisionTransformer

    def scores(
        self, cls: Tensor | None, patches: Tensor | None, *, scored: bool = True
    ) -> tuple[Any, Any]:
        """Prototype scores of image and patch features.

        Args:
            cls: [R, C] CLS features; None without an image-level term.
            patches: [M, C] features of masked patches; None without a patch-level term.
            scored: False gives twice the vectors and prototypes of `DINOHead.forward` instead.
        Returns:
            [R, K] and [M, K]. A shared head sees all rows in one call.
        """
        if cls is not None and patches is not None and "ibot_head" not in self:
            scores = self["dino_head"](torch.cat((cls, patches)), scored=scored)  # [R + M, K]
            if scored:
                return scores[: len(cls)], scores[len(cls) :]
            vectors, weight = scores
            return (vectors[: len(cls)], weight), (vectors[len(cls) :], weight)
        patch_head = "ibot_head" if "ibot_head" in self else "dino_head"
        dino = None if cls is None else self["dino_head"](cls, scored=scored)
        return dino, None if patches is None else self[patch_head](patches, scored=scored)


class Student(SubNetworks):
    """The trained networks; calling it computes the losses, so it is what DDP or compile wraps.

    Args:
        modules: the sub-networks.
        loss: weights and temperatures of the objective.
        koleo_crops: global crops that enter KoLeo.
        precision: bf16 runs backbone and heads under autocast; the losses are fp32 either way.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        *,
        loss: LossConfig,
        koleo_crops: Literal["both", "first"],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        super().__init__(modules)
        self.loss = loss
        self.koleo_crops: Literal["both", "first"] = koleo_crops
        self.precision: Literal["fp32", "bf16"] = precision

    def forward(
        self, batch: Batch, targets: Targets, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: crops, masks and indices of the masked patches, on the networks' device.
            targets: the teacher's for the same batch.
            generator: draws the samples that residual branches skip.
        Returns:
            `LOSS_NAMES` -> fp32 scalars. Only `total` carries a graph: the weighted sum that is
            optimised. The others are unweighted parts; the image-level term is
            dino_global + dino_local.
        """
        num_global = batch.global_crops.shape[0]  # 2B
        crops, masks = [batch.global_crops], [batch.masks]
        if batch.local_crops.shape[0] > 0:
            crops, masks = [*crops, batch.local_crops], [*masks, None]
        with _precision(self.precision, batch.global_crops.device):
            cls, patches = self.backbone.forward_selected(  # [2B + LB, C], [M, C]
                crops, masks, _masked_indices(batch), generator
            )
            dino, ibot = self.scores(
                None if targets.dino is None else cls,
                None if targets.ibot is None else patches,
                scored=torch.compiler.is_compiling() or not _fuses_losses(cls),
            )
        return self._losses(batch, targets, cls[:num_global], dino, ibot)

    def _losses(
        self,
        batch: Batch,
        targets: Targets,
        global_cls: Tensor,
        dino: Tensor | tuple[Tensor, Tensor] | None,
        ibot: Tensor | tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """The terms and their weighted sum; a term of weight 0 is 0 and costs nothing.

        `dino` and `ibot` are scores, or the vectors and prototypes that make them.
        """
        loss, num_global = self.loss, global_cls.shape[0]
        zero = global_cls.new_zeros((), dtype=torch.float32)
        parts: dict[str, Tensor] = {name: zero for name in LOSS_NAMES}
        dino_total, temperature = zero, loss.student_temperature
        if targets.dino is not None and dino is not None:
            if isinstance(dino, tuple):
                dino_total, parts["dino_global"], parts["dino_local"] = dino_prototype_loss(
                    *dino, targets.dino, num_global=num_global, student_temperature=temperature
                )
            else:
                parts["dino_global"], parts["dino_local"] = dino_loss(
                    dino[:num_global],
                    dino[num_global:],
                    targets.dino,
                    student_temperature=temperature,
                )
                dino_total = parts["dino_global"] + parts["dino_local"]
        if targets.ibot is not None and ibot is not None:
            weights = batch.mask_weights[: batch.num_masked]
            if isinstance(ibot, tuple):
                ibot_part = functools.partial(ibot_prototype_loss, *ibot)
            else:
                ibot_part = functools.partial(ibot_loss, ibot)
            parts["ibot"] = ibot_part(
                targets.ibot, weights, num_crops=num_global, student_temperature=temperature
            )
        if loss.koleo_weight > 0:
            parts["koleo"] = koleo_loss(global_cls, crops=self.koleo_crops)
        total = (
            loss.dino_weight * dino_total
            + loss.ibot_weight * parts["ibot"]
            + loss.koleo_weight * parts["koleo"]
        )
        return {**{name: part.detach() for name, part in parts.items()}, "total": total}


class StudentTeacher(nn.Module):
    """The networks of a run. Its state dict is all of their state, centres included.

    `student` is trained; `teacher` starts as its copy, takes no gradient and follows it as a moving
    average; `centering` makes targets of the teacher's scores.
    """

    def __init__(self, student: Student, teacher: SubNetworks, centering: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.centering = centering
        # In a tuple: a wrapper must not become a submodule, or every weight had two names.
        self._student_losses_module: tuple[nn.Module] = (student,)
        self.train()

    @property
    def student_losses_module(self) -> nn.Module:
        """What computes the losses: the student, or what `wrap_student` put around it."""
        return self._student_losses_module[0]

    def wrap_student(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Put DistributedDataParallel, torch.compile or the like around the student.

        Args:
            wrapper: takes the present `student_losses_module`, returns the one to call instead.
        """
        self._student_losses_module = (wrapper(self.student_losses_module),)

    def train(self, mode: bool = True) -> StudentTeacher:
        """Set the student's mode; the teacher never drops a residual branch."""
        super().train(mode)
        self.teacher.eval()
        return self


def build_student_teacher(
    config: ModelConfig,
    loss: LossConfig,
    crops: CropConfig,
    *,
    recipe: Literal["official", "paper"],
    seed: int,
    device: torch.device | str,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> StudentTeacher:
    """Student and teacher with the same random weights, a pure function of the seed.

    Args:
        config: the backbone.
        loss: heads, terms and centering.
        crops: the side of the global crops sets the number of position embeddings.
        recipe: decides which crops enter KoLeo unless `loss.koleo_crops` does.
        seed: of the weights; torch's global generators are left as they were.
        device: where the networks go. Weights are drawn on the CPU, so they do not depend on it;
            on `meta` nothing is drawn or stored.
        precision: bf16 runs backbone and heads under autocast.
    Raises:
        ConfigError: neither the image-level nor the patch-level term has a weight.
    """
    if loss.dino_weight <= 0 and loss.ibot_weight <= 0:
        raise ConfigError(
            "config: loss.dino_weight or loss.ibot_weight must be greater than 0, got both 0"
        )
    koleo_crops: Literal["both", "first"]
    if loss.koleo_crops == "recipe":
        koleo_crops = "both" if recipe == "official" else "first"
    else:
        koleo_crops = loss.koleo_crops
    is_meta = torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        modules = _sub_networks(config, loss, crops, device="meta" if is_meta else "cpu")
    student = Student(modules, loss=loss, koleo_crops=koleo_crops, precision=precision)
    teacher = SubNetworks(copy.deepcopy(modules))
    centering = nn.ModuleDict()
    if loss.dino_weight > 0:
        num_prototypes = loss.dino_head.num_prototypes
        centering["dino"] = build_centering(loss, num_prototypes=num_prototypes)
    if loss.ibot_weight > 0:
        head = loss.ibot_head if loss.separate_ibot_head else loss.dino_head
        centering["ibot"] = build_centering(loss, num_prototypes=head.num_prototypes)
    return StudentTeacher(student, teacher, centering).to(device)


@torch.no_grad()
def teacher_targets(pair: StudentTeacher, batch: Batch, *, temperature: float) -> Targets:
    """Targets of one batch: the teacher sees the global crops unmasked.

    Args:
        pair: the networks; the centres move on if there are any.
        batch: crops and indices of the masked patches, on the networks' device.
        temperature: the teacher's at this step.
    Returns:
        Targets for the CLS tokens and for the patches that are masked in the student; no other
        patch goes through a head.
    """
    with _precision(pair.student.precision, batch.global_crops.device):
        cls, patches = pair.teacher.backbone.forward_selected(  # [2B, C], [M, C]
            [batch.global_crops], [None], _masked_indices(batch)
        )
        dino_scores, ibot_scores = pair.teacher.scores(
            cls if "dino" in pair.centering else None,
            patches if "ibot" in pair.centering else None,
        )
    return Targets(
        dino=_centered(pair, "dino", dino_scores, temperature=temperature),
        ibot=_centered(pair, "ibot", ibot_scores, temperature=temperature),
    )


def student_losses(
    pair: StudentTeacher,
    batch: Batch,
    targets: Targets,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Losses of one batch, all crops in one packed forward; `total` is to be differentiated.

    Args:
        pair: the networks.
        batch: crops, masks and indices, on the networks' device.
        targets: of `teacher_targets` for the same batch.
        generator: draws the samples that residual branches skip.
    Returns:
        `LOSS_NAMES` -> fp32 scalars, see `Student.forward`.
    """
    return pair.student_losses_module(batch, targets, generator)


def teacher_state_official(pair: StudentTeacher, *, heads: bool = False) -> dict[str, Tensor]:
    """The teacher's weights under official DINOv2's names, ready to be written to a file.

    Args:
        pair: the networks.
        heads: False gives the bare keys of a published backbone; True those of a training dump,
            `backbone.…`, `dino_head.…` and `ibot_head.…`.
    Returns:
        Name -> fp32 tensor on the CPU, in the order of the network.
    """
    module = pair.teacher if heads else pair.teacher.backbone
    state = module.state_dict()
    return {name: value.detach().to("cpu", torch.float32) for name, value in state.items()}


def _check_crops(config: ModelConfig, crops: CropConfig) -> None:
    """Refuse crops that cannot be cut into patches, naming the settings and the nearest sides."""
    preset = ARCHITECTURES.get(config.arch)  # an unknown name is said by `create_model`
    patch = config.patch_size or (preset.patch_size if preset else 1)
    for key, px in (("global_px", crops.global_px), ("local_px", crops.local_px)):
        if px % patch:
            below = px - px % patch
            ways = " or ".join(str(side) for side in (below, below + patch) if side)
            raise ConfigError(
                f"config: crops.{key} must be a multiple of the patch size {patch}, got {px}; "
                f"use {ways}"
            )


def _sub_networks(
    config: ModelConfig, loss: LossConfig, crops: CropConfig, *, device: str
) -> dict[str, nn.Module]:
    """The backbone, and the heads that some term of the loss uses."""
    _check_crops(config, crops)
    backbone = create_model(
        config.arch,
        image_px=crops.global_px,
        device=device,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        ffn=config.ffn,
        num_registers=config.num_registers,
        drop_ratio=config.drop_ratio,
        layer_scale=config.layer_scale,
        position_resize=config.position_resize,
        recompute=config.recompute,
    )
    heads = {"dino_head": loss.dino_head}
    if loss.separate_ibot_head:
        weights = {"dino_head": loss.dino_weight, "ibot_head": loss.ibot_weight}
        heads = {"dino_head": loss.dino_head, "ibot_head": loss.ibot_head}
        heads = {name: head for name, head in heads.items() if weights[name] > 0}
    return {
        "backbone": backbone,
        **{
            name: DINOHead(
                backbone.embed_dim,
                head.num_prototypes,
                hidden_dim=head.hidden_dim,
                bottleneck_dim=head.bottleneck_dim,
                nlayers=head.num_layers,
            )
            for name, head in heads.items()
        },
    }


def _centered(
    pair: StudentTeacher, term: str, scores: Tensor | None, *, temperature: float
) -> SoftTargets | None:
    """Targets of one term out of the teacher's scores; None without scores."""
    return None if scores is None else pair.centering[term](scores, temperature=temperature)


def _masked_indices(batch: Batch) -> Tensor:
    """Flat positions [M] of the masked patches; padding goes through no block's end and no head."""
    return batch.mask_indices[: batch.num_masked]


def _fuses_losses(features: Tensor) -> bool:
    """Whether student scores are made inside the loss, in float32 and never whole.

    Where a kernel computes cross-entropy; the reference keeps scores of the heads' precision.
    """
    return choose_backend("cross_entropy", features, None) != "reference"


@contextlib.contextmanager
def _precision(precision: Literal["fp32", "bf16"], device: torch.device) -> Iterator[None]:
    """Autocast to bf16, or, for fp32, no autocast even inside a caller's."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield
