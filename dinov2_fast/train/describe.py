"""What a run would be: settings, sizes, steps, memory that stays taken, and why it will be slow."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_fast import environment, native
from dinov2_fast.config import Config, to_yaml
from dinov2_fast.train.parallel import launched_processes
from dinov2_fast.train.schedules import Schedules
from dinov2_fast.train.student_teacher import build_student_teacher

# Official DINOv2 calls this many steps an epoch, whatever the data set.
EPOCH_STEPS = 1250
_BYTES_PER_VALUE = 4  # weights, gradients and moments are fp32


def describe(config: Config, *, num_processes: int | None = None) -> str:
    """The text of `--dry-run`. The networks are built without memory for their weights.

    Args:
        config: the run.
        num_processes: processes of the run; None is what the launcher started.
    """
    processes = num_processes or launched_processes()
    global_batch = config.run.batch_size * processes
    schedules = Schedules(config.schedule, config.optimizer, global_batch)
    with torch.device("meta"):
        pair = build_student_teacher(
            config.model,
            config.loss,
            config.crops,
            recipe=config.recipe,
            seed=config.run.seed,
            device="meta",
        )
    networks = {name: count_parameters(module) for name, module in pair.student.items()}
    total_steps = config.schedule.total_steps
    state = fixed_state_bytes(sum(networks.values()))
    rows = [
        *((f"parameters of {name}", f"{count:,}") for name, count in networks.items()),
        ("steps", f"{total_steps:,} ({total_steps / EPOCH_STEPS:.4g} official epochs)"),
        ("warm-up steps", f"{schedules.warmup_steps:,}"),
        ("steps with frozen prototypes", f"{schedules.frozen_last_layer_steps:,}"),
        ("global batch", f"{global_batch:,} ({config.run.batch_size:,} x {processes} processes)"),
        ("peak learning rate", f"{schedules.peak_lr:.4g}"),
        ("images per official epoch", f"{EPOCH_STEPS * global_batch:,}"),
        ("images in the whole run", f"{total_steps * global_batch:,}"),
        ("fixed state per process", f"{state / 2**30:.3f} GiB ({state:,} bytes)"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([to_yaml(config), *lines])


def why_slow(device: torch.device) -> str:
    """One line for a run that computes without the extension and was not told to; else empty.

    Args:
        device: of the run. On a GPU automatic choice takes the references anyway.
    """
    chosen = environment.backend() or environment.preferred_backend()
    if device.type != "cpu" or chosen is not None or not native.why_not():
        return ""
    return (
        "slow: every operation takes its PyTorch reference, there are no native kernels: "
        f"{native.why_not()} (`dinov2-fast doctor` tells more)"
    )


def count_parameters(module: nn.Module) -> int:
    """Scalars in the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def fixed_state_bytes(num_parameters: int) -> int:
    """Memory a process holds through the whole run: student, gradients, two moments, teacher.

    Args:
        num_parameters: of the student, heads included; the teacher has as many.
    """
    return 5 * num_parameters * _BYTES_PER_VALUE
