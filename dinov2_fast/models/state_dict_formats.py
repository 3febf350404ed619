"""Names of the same weights in other projects, and strict translation in both directions.

Official DINOv2's names are the hub of the wheel. For every layout a table gives, for each official
key, the key or keys that hold it there; a key too many or too few is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dinov2_fast.errors import CheckpointError
from dinov2_fast.models.mismatch import listed, mismatch
from dinov2_fast.models.training_dumps import (
    CHUNKED_BLOCK,
    HEADS,
    State,
    backbone_of,
    entries_below,
    head_to_official,
    network_of,
    unchunked,
)

Layout = Literal["official", "timm", "hf", "hf5", "dump"]

LAYOUTS: dict[str, str] = {
    "official": "official DINOv2",
    "timm": "timm",
    "hf": "Hugging Face (names on disk and of transformers 4)",
    "hf5": "Hugging Face (module names of transformers 5)",
    "dump": "DINOv2 training dump",
}

_BLOCK = re.compile(r"^(?:blocks|encoder\.layer)\.(\d+)\.")

_HF_TOP = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_SAME = {"norm1": ("norm1",), "norm2": ("norm2",)} | {
    name: (name,) for name in ("mlp.fc1", "mlp.fc2")
}
_HF_BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "hf": _HF_SAME
    | {
        "attn.qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
        "attn.proj": ("attention.output.dense",),
        "mlp.w12": ("mlp.weights_in",),
        "mlp.w3": ("mlp.weights_out",),
    },
    "hf5": _HF_SAME
    | {
        "attn.qkv": tuple(f"attention.{name}_proj" for name in "qkv"),
        "attn.proj": ("attention.o_proj",),
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
    },
}


@dataclass(frozen=True)
class Skeleton:
    """What decides which keys a backbone has."""

    depth: int
    ffn: Literal["mlp", "swiglu"]
    has_registers: bool


def official_keys(skeleton: Skeleton) -> list[str]:
    """Every key of a published backbone file."""
    top = ["cls_token", "pos_embed", "mask_token"]
    top += ["register_tokens"] if skeleton.has_registers else []
    ffn = ("mlp.w12", "mlp.w3") if skeleton.ffn == "swiglu" else ("mlp.fc1", "mlp.fc2")
    linear = ["norm1", "attn.qkv", "attn.proj", "norm2", *ffn]
    keys = [*top, *_weight_and_bias(["patch_embed.proj", "norm"])]
    for i in range(skeleton.depth):
        leaves = [*_weight_and_bias(linear), "ls1.gamma", "ls2.gamma"]
        keys += [f"blocks.{i}.{leaf}" for leaf in leaves]
    return keys


def detect_format(state: Mapping[str, Tensor]) -> Layout:
    """The layout that the keys of a backbone are in.

    Args:
        state: keys and tensors of a file; heads and wrappers of training dumps may be there.
    Raises:
        CheckpointError: keys of no known layout.
    """
    backbone, wrapped = backbone_of(state)
    if any(key.startswith("embeddings.") for key in backbone):
        return "hf5" if any(".attention.q_proj." in key for key in backbone) else "hf"
    if "patch_embed.proj.weight" not in backbone:
        raise CheckpointError(
            f"weights: expected a DINOv2 backbone of a known layout ({', '.join(LAYOUTS)}), "
            f"got the keys {listed(sorted(state)) or 'none'}"
        )
    if wrapped or any(CHUNKED_BLOCK.match(key) for key in backbone):
        return "dump"
    # timm keeps no mask token; the other marks of an official file rule it out all the same.
    official_marks = ("mask_token", "register_tokens", "blocks.0.mlp.w12.weight")
    return "official" if any(mark in backbone for mark in official_marks) else "timm"


def to_official(state: Mapping[str, Tensor]) -> State:
    """A backbone of any known layout under official names.

    timm files hold no mask token: it becomes zero, as before training. With registers they hold
    the sum of the CLS token and its position: it becomes the token, and the position zero.

    Args:
        state: keys and tensors of a file.
    Returns:
        Official keys; tensors that need no translation are not copied.
    Raises:
        CheckpointError: unknown layout; missing, unexpected or unfit keys, all listed.
    """
    layout = detect_format(state)
    backbone, _ = backbone_of(state)
    if layout == "dump":
        backbone, layout = unchunked(backbone), "official"
    skeleton = _skeleton(backbone, layout)
    table = _table(layout, skeleton)
    if layout != "official":
        backbone, table = _with_mask_token(backbone, table)
    _check_keys(backbone, [name for names in table.values() for name in names], layout)
    official = {key: _joined(backbone, names) for key, names in table.items()}
    if layout == "timm" and skeleton.has_registers:
        cls_position = torch.zeros_like(official["cls_token"])
        official["pos_embed"] = torch.cat([cls_position, official["pos_embed"]], dim=1)
    return official


def from_official(state: Mapping[str, Tensor], target: Layout, *, block_chunks: int = 4) -> State:
    """A backbone with official names under those of another layout.

    Args:
        state: official keys.
        target: `timm`; `hf` for the names on disk; `hf5` for the module names of transformers 5;
            `dump` for `teacher.backbone.blocks.C.I.` names; or `official`.
        block_chunks: groups of blocks in a `dump`, at most one for each block; 0 leaves blocks
            ungrouped.
    Returns:
        Keys of the target; tensors that need no translation are not copied.
    Raises:
        CheckpointError: keys that are not those of an official backbone.
    """
    if target not in LAYOUTS:
        raise ValueError(f"from_official: expected one of {', '.join(LAYOUTS)}, got {target!r}")
    if block_chunks < 0:
        raise ValueError(f"from_official: expected block_chunks >= 0, got {block_chunks}")
    skeleton = _skeleton(state, "official")
    _check_keys(state, official_keys(skeleton), "official")
    table = _table(target, skeleton, block_chunks=block_chunks)
    source = dict(state)
    if target == "timm" and skeleton.has_registers:
        source["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        source["pos_embed"] = state["pos_embed"][:, 1:].clone()
    out: State = {}
    for key, names in table.items():
        out.update(zip(names, _parted(source[key], key, len(names)), strict=True))
    return out


def conversion_notes(source: Layout, target: Layout, official: Mapping[str, Tensor]) -> list[str]:
    """What a person should know about a conversion, one sentence each."""
    registers = "register_tokens" in official
    notes = []
    if source == "timm":
        notes.append("timm files hold no mask token; it is zero now, as before training")
        if registers:
            notes.append("the CLS token holds the sum with its position, which is zero now")
    if target == "timm":
        notes.append("timm has no mask token; it is left out")
        if registers:
            notes.append("the position of CLS is added to its token; the outputs are the same")
    if target in ("timm", "hf", "hf5") and not registers:
        notes.append(
            f"{'timm' if target == 'timm' else 'transformers'} resizes position embeddings by "
            "another method; outputs agree at the native image size and differ slightly elsewhere"
        )
    return notes


def split_dump(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Backbone and heads of a training dump, each under official names.

    Args:
        state: keys and tensors of a dump; of teacher and student the teacher is taken.
    Returns:
        `backbone`, and `dino_head` and `ibot_head` where the dump has them.
    Raises:
        CheckpointError: see `to_official`.
    """
    parts = {"backbone": to_official(state)}
    selected, _ = network_of(state)
    for head in HEADS:
        entries = entries_below(selected, head)
        if entries:
            parts[head] = head_to_official(entries)
    return parts


def block_indices(keys: Iterable[str]) -> set[int]:
    """Numbers of the blocks that keys mention, in official or Hugging Face names."""
    return {int(match[1]) for match in map(_BLOCK.match, keys) if match}


def _table(
    layout: Layout, skeleton: Skeleton, *, block_chunks: int = 0
) -> dict[str, tuple[str, ...]]:
    """Official key -> keys that hold it, in order along dimension 0; () if nothing does."""
    keys = official_keys(skeleton)
    if layout == "official":
        return {key: (key,) for key in keys}
    if layout == "dump":
        chunk = max(skeleton.depth // block_chunks, 1) if block_chunks else 0
        return {key: (_dump_name(key, chunk),) for key in keys}
    if layout == "timm":
        renamed = {"register_tokens": "reg_token"}
        table = {
            key: (renamed.get(key, key.replace("mlp.w12.", "mlp.fc1.").replace("w3.", "fc2.")),)
            for key in keys
        }
        return {**table, "mask_token": ()}
    return {key: _hf_names(key, _HF_BLOCKS[layout]) for key in keys}


def _with_mask_token(
    backbone: State, table: dict[str, tuple[str, ...]]
) -> tuple[State, dict[str, tuple[str, ...]]]:
    """A zero mask token where a layout has none, or may go without one."""
    (mask_name,) = table["mask_token"] or ("mask_token",)
    (cls_name,) = table["cls_token"]
    cls_token = backbone.get(cls_name)
    if mask_name in backbone or cls_token is None:
        return backbone, table
    backbone = {**backbone, mask_name: torch.zeros_like(cls_token).flatten(0, -2)}
    return backbone, {**table, "mask_token": (mask_name,)}


def _dump_name(key: str, chunk: int) -> str:
    """`blocks.5.x` as `blocks.1.5.x` where four blocks make a chunk; the index stays global."""
    match = _BLOCK.match(key)
    if match and chunk:
        key = key.replace("blocks.", f"blocks.{int(match[1]) // chunk}.", 1)
    return f"teacher.backbone.{key}"


def _hf_names(key: str, leaves: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    match = _BLOCK.match(key)
    if key in _HF_TOP:
        return (_HF_TOP[key],)
    layer, _, kind = key.rpartition(".")
    if not match:
        return (f"{_HF_TOP[layer]}.{kind}",)
    prefix, leaf = f"encoder.layer.{match[1]}", layer[match.end() :]
    if kind == "gamma":
        return (f"{prefix}.layer_scale{leaf[-1]}.lambda1",)
    return tuple(f"{prefix}.{name}.{kind}" for name in leaves[leaf])


def _weight_and_bias(layers: Iterable[str]) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def _skeleton(backbone: Mapping[str, Tensor], layout: Layout) -> Skeleton:
    """Depth, feed-forward layer and registers as the keys (in timm the shapes) tell them."""
    blocks = block_indices(backbone)
    if not blocks:
        raise CheckpointError(
            f"weights: expected blocks of a transformer in the {layout} layout, got the keys "
            f"{listed(sorted(backbone))}"
        )
    swiglu = any(
        mark in key for key in backbone for mark in (".w12.", ".weights_in.", ".gate_proj.")
    )
    if layout == "timm":
        first, second = (backbone.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
        if first is not None and second is not None and first.ndim == second.ndim == 2:
            swiglu = first.shape[0] == 2 * second.shape[1]
    registers = any(key.endswith(("register_tokens", "reg_token")) for key in backbone)
    return Skeleton(len(blocks), "swiglu" if swiglu else "mlp", registers)


def _check_keys(state: Mapping[str, Tensor], expected: Collection[str], layout: Layout) -> None:
    wanted = set(expected)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        raise mismatch(
            f"weights: the keys are not those of a backbone in the {layout} layout",
            missing=missing,
            unexpected=unexpected,
            ways_out=["give the backbone alone, as its project publishes or saves it"],
        )


def _joined(state: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """The parts of an official tensor, one after the other along dimension 0."""
    parts = [state[name] for name in names]
    if len(parts) == 1:
        return parts[0]
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        raise mismatch(
            "weights: expected parts of the same shape and dtype",
            misshaped=[f"{n} {tuple(state[n].shape)} {state[n].dtype}" for n in names],
        )
    return torch.cat(parts)


def _parted(tensor: Tensor, key: str, count: int) -> list[Tensor]:
    """An official tensor as `count` equal parts along dimension 0, each with its own memory."""
    if count == 0:
        return []
    if count == 1:
        return [tensor]
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise mismatch(
            "weights: the tensor cannot be parted",
            misshaped=[f"{key} expected a multiple of {count} rows, got {tuple(tensor.shape)}"],
        )
    return [part.clone() for part in tensor.chunk(count)]
