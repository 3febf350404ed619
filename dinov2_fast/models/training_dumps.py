"""The names that training puts around a backbone: wrappers, networks, chunks of blocks, heads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dinov2_fast.errors import CheckpointError
from dinov2_fast.models.mismatch import mismatch

State = dict[str, Tensor]

CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")
HEADS = ("dino_head", "ibot_head")

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NETWORKS = ("teacher", "student")  # the teacher is what is evaluated and published
# What checkpoints, official ones and those of this project, hold beside the networks.
_TRAINING_STATE = ("dino_loss", "ibot_patch_loss", "koleo_loss", "centering", "optimizer")
_TRANSFORMERS_ROOTS = ("dinov2", "dinov2_with_registers")
_PARAMETRIZED = {
    "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
}


def network_of(state: Mapping[str, Tensor]) -> tuple[State, bool]:
    """The teacher, else the student, else everything; and whether it was wrapped."""
    bare: State = {}
    for key, tensor in state.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in bare:
            raise CheckpointError(f"weights: expected one tensor for {name}, got a second: {key}")
        bare[name] = tensor
    for network in _NETWORKS:
        chosen = entries_below(bare, network)
        if chosen:
            known = (*_NETWORKS, *_TRAINING_STATE)
            strangers = [key for key in bare if key.split(".")[0] not in known]
            if strangers:
                raise mismatch("weights: a training dump holds more", unexpected=strangers)
            return chosen, True
    return bare, False


def backbone_of(state: Mapping[str, Tensor]) -> tuple[State, bool]:
    """A backbone without the prefixes around it; and whether it came from a training dump."""
    selected, wrapped = network_of(state)
    backbone = entries_below(selected, "backbone")
    if backbone:
        strangers = [k for k in selected if k.split(".")[0] not in ("backbone", *HEADS)]
        if strangers:
            raise mismatch("weights: a training dump holds more", unexpected=strangers)
        return backbone, True
    for root in _TRANSFORMERS_ROOTS:
        inner = entries_below(selected, root)
        if inner:
            return inner | {
                k: v for k, v in selected.items() if not k.startswith(f"{root}.")
            }, False
    return selected, wrapped


def entries_below(state: Mapping[str, Tensor], prefix: str) -> State:
    """Entries under a dotted prefix, without it."""
    dotted = f"{prefix}."
    return {k.removeprefix(dotted): v for k, v in state.items() if k.startswith(dotted)}


def unchunked(backbone: State) -> State:
    """Training dumps group blocks as `blocks.CHUNK.BLOCK.`; the second number counts all blocks."""
    out: State = {}
    for key, tensor in backbone.items():
        name = CHUNKED_BLOCK.sub(r"blocks.\1.", key)
        if name in out:
            raise CheckpointError(
                f"weights: expected block numbers that count over all chunks, got {name} twice "
                f"(the second as {key})"
            )
        out[name] = tensor
    return out


def head_to_official(state: Mapping[str, Tensor]) -> State:
    """A projection head with `last_layer.weight_g` and `weight_v`, whichever API wrote it."""
    back = {parametrized: official for official, parametrized in _PARAMETRIZED.items()}
    return {back.get(key, key): tensor for key, tensor in state.items()}


def head_to_parametrized(state: Mapping[str, Tensor]) -> State:
    """A projection head under the names of torch's parametrised weight norm."""
    return {_PARAMETRIZED.get(key, key): tensor for key, tensor in state.items()}
