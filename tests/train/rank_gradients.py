"""One rank of a data-parallel step, a program of its own: `rank_gradients RANK WORLD_SIZE FOLDER`.

Stores the losses and gradients of its part of a batch, after the ranks have averaged gradients.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

from dinov2_fast.data.collate import Batch, index_masks
from dinov2_fast.train.student_teacher import student_losses, teacher_targets
from tests.train.batches import SEPARATE, build_pair, synthetic_batch

# Images of rank 0 and rank 1 have different numbers of masked patches.
BATCH_SIZE = 4
MASKED_COUNTS = (3, 0, 1, 2, 0, 1, 0, 5)


def step(batch: Batch, *, wrap: bool) -> dict[str, torch.Tensor]:
    """Losses and gradients of the student in float64."""
    # KoLeo compares the images of one process only, so it must differ between world sizes.
    loss = dataclasses.replace(SEPARATE, koleo_weight=0.0)
    pair = build_pair(loss).double()
    if wrap:
        pair.wrap_student(nn.parallel.DistributedDataParallel)
    targets = teacher_targets(pair, batch, temperature=0.05)
    losses = student_losses(pair, batch, targets)
    losses["total"].backward()
    gradients = {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}
    return {**{f"loss.{name}": v.detach() for name, v in losses.items()}, **gradients}


def part_of(batch: Batch, *, rank: int, world_size: int) -> Batch:
    """The batch of one rank: its share of the images with all their crops, in float64."""
    num_images = len(batch.sample_indices)
    images = torch.arange(num_images).chunk(world_size)[rank]

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (-1, num_images))[:, images].flatten(0, 1)

    masks = rows(batch.masks)
    indices, weights, num_masked = index_masks(masks, upper_bound=int(masks.sum()))
    return dataclasses.replace(
        batch,
        global_crops=rows(batch.global_crops).double(),
        local_crops=rows(batch.local_crops).double(),
        masks=masks,
        mask_indices=indices,
        mask_weights=weights.double(),
        num_masked=num_masked,
        sample_indices=images,
    )


def whole_batch() -> Batch:
    """The images of all ranks."""
    return synthetic_batch(batch_size=BATCH_SIZE, masked_counts=MASKED_COUNTS)


def main(rank: int, world_size: int, folder: Path) -> None:
    """Join the group, take the step, store its outcome."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        batch = part_of(whole_batch(), rank=rank, world_size=world_size)
        torch.save(step(batch, wrap=True), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
