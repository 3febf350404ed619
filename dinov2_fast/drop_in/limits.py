"""From which batch on each path of a half pays; smaller ones are left to the library's modules.

Work is counted in tokens times channels squared, of which a block's time is a multiple on every
path. What a path adds (calls, copies of rows, passes over weights) does not shrink with the batch;
below its limit a half runs by its library's modules.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_fast.nn.module_calls import compute_dtype


@dataclass(frozen=True)
class Limits:
    """Where the paths begin, for one kind of processor and one type of products.

    Args:
        owned_tokens: least tokens in a batch for nodes that own their memory: passes over weights
            cost as much as this share of products.
        owned_work: least work for them.
        saved_work: least work that skipping dropped samples must save.
        without_gradients: whether nodes that own their memory pay in inference too.
    """

    owned_tokens: int
    owned_work: float
    saved_work: float
    without_gradients: bool = False

    def owned_pays(self, num_tokens: int, channels: int) -> bool:
        """Whether a half that owns its memory is at least as fast as its library's modules."""
        return num_tokens >= self.owned_tokens and num_tokens * channels**2 >= self.owned_work

    def skipping_pays(self, num_tokens: int, channels: int, dropped_ratio: float) -> bool:
        """Whether computing a half without its dropped samples is faster than with them."""
        saved = num_tokens * channels * (dropped_ratio * channels - COPIES)
        return dropped_ratio > 0 and saved >= self.saved_work


# Gathering rows and adding them back moves what this many products a channel take.
COPIES = 16

# Chosen from blocks of 128 to 768 channels, forward and backward, on one thread of an AMD EPYC (Zen
# 1, AVX2): without drop path owned halves break even there, and skipping is ahead from there on.
# `benchmarks/bench_accelerate.py` has batches on both sides.
FLOAT32 = Limits(owned_tokens=2000, owned_work=2e8, saved_work=2e6)

# Likewise. The library's products of bf16 take several times as long there as those of float32, in
# which owned halves compute, so these are ahead much sooner.
SLOW_BFLOAT16 = Limits(owned_tokens=0, owned_work=1e6, saved_work=2e6, without_gradients=True)

# Not measured. Skipping adds some 20 launches of 10 us, in which a GPU does 1e10 operations; work
# stands for about 36 of them.
GPU = Limits(owned_tokens=2000, owned_work=2e8, saved_work=4e8)


def limits_of(x: Tensor) -> Limits:
    """The limits that hold for tokens, by their device and what autocast makes of them."""
    if not x.is_cpu:
        return GPU
    # Cheap to ask: names of devices, which other questions take, cost 20 us out of cold caches.
    if not torch._C._is_any_autocast_enabled() or not multiplies_bfloat16_slowly():
        return FLOAT32
    return SLOW_BFLOAT16 if compute_dtype(x) == torch.bfloat16 else FLOAT32


@functools.cache
def multiplies_bfloat16_slowly() -> bool:
    """Whether this CPU is of the kind that `SLOW_BFLOAT16` was measured on: x86 before AVX-512."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx2")) and not found.get("avx512_f")


def in_words(channels: int, device_type: str, *, owning: bool, dropping: bool) -> str:
    """The limits in tokens of a batch, for a person.

    Args:
        channels: C of the model.
        device_type: where its parameters are.
        owning: whether its halves can own their memory.
        dropping: whether it has drop path.
    """
    on_cpu = device_type == "cpu"
    least, words = FLOAT32 if on_cpu else GPU, []
    if owning:
        tokens = max(least.owned_tokens, math.ceil(least.owned_work / channels**2))
        begin = f"from {tokens} tokens in a batch on in training"
        if on_cpu and multiplies_bfloat16_slowly():
            tokens = math.ceil(SLOW_BFLOAT16.owned_work / channels**2)
            begin += f", from {tokens} under autocast to bfloat16, inference included"
        words.append(f"own their memory {begin}")
    if dropping:
        tokens = math.ceil(least.saved_work / (channels * max(channels - COPIES, 1)))
        words.append(f"skip dropped samples where that saves {tokens} tokens or more")
    words.append("leave smaller batches to their library's modules, which are as fast there")
    return f"halves of {channels} channels {'; they '.join(words)}"
