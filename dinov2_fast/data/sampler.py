"""Which image stands at which position of an endless shuffled stream; there is no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinov2_fast.data.seeding import ORDER, derive_seed, mix64

_NUM_HALF_ROUNDS = 8


@dataclass(frozen=True)
class Permutation:
    """A random permutation of 0..size-1 in O(1) memory: a Feistel network over pairs of numbers.

    An index is written as (left, right) with left < rows and right < columns, where rows * columns
    is the smallest near-square product that covers `size`. Each half-round adds to one number a
    function of the other, modulo its range, which can be undone; so the network is a bijection on
    rows * columns, and following it until the result is below `size` ("cycle walking") is one on
    0..size-1. At most about sqrt(size) pairs lie outside, so it is hardly ever followed twice.

    Source: Luby and Rackoff, How to construct pseudorandom permutations, 1988; Black and Rogaway,
    Ciphers with arbitrary finite domains, 2002.
    """

    size: int
    """Number of items, at least 1."""
    key: int
    """Permutations with different keys are unrelated."""

    def __post_init__(self) -> None:
        """Checks the size."""
        if self.size < 1:
            raise ValueError(f"Permutation: size must be at least 1, got {self.size}")

    def __call__(self, position: int) -> int:
        """The item at a position in 0..size-1."""
        if not 0 <= position < self.size:
            raise IndexError(f"Permutation: position must be in 0..{self.size - 1}, got {position}")
        rows = math.isqrt(self.size - 1) + 1
        columns = -(-self.size // rows)
        item = position
        while True:
            left, right = divmod(item, columns)
            for half_round in range(0, _NUM_HALF_ROUNDS, 2):
                left = (left + mix64(mix64(right + (half_round << 48)) ^ self.key)) % rows
                right = (right + mix64(mix64(left + (half_round + 1 << 48)) ^ self.key)) % columns
            item = left * columns + right
            if item < self.size:
                return item


def sample_index(seed: int, position: int, num_samples: int) -> int:
    """The image at a position of the stream: every pass over the data is a fresh permutation.

    Args:
        seed: of the run.
        position: samples drawn before this one by all ranks together since step 0; any size.
        num_samples: images in the source, at least 1.

    Returns:
        An index in 0..num_samples-1. Two passes meet in one batch where a pass ends inside it.
    """
    pass_number, offset = divmod(position, num_samples)
    return Permutation(num_samples, derive_seed(seed, ORDER, pass_number))(offset)


def batch_positions(step: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Stream positions of one rank's part of the global batch of a step.

    The global batch is the same for every split of it over ranks: 4 x 16 and 1 x 64 draw the same
    64 images at every step.

    Args:
        step: optimizer steps taken before.
        batch_size: B, images per rank.
        rank: in 0..world_size-1.
        world_size: ranks.
    """
    start = (step * world_size + rank) * batch_size
    return range(start, start + batch_size)
