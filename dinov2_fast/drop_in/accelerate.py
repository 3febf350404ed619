"""`accelerate` makes the ViT somebody already has a fast one, in place; `restore` undoes it."""

from __future__ import annotations

from torch import nn

from dinov2_fast.drop_in import huggingface, limits, official, timm
from dinov2_fast.drop_in.fast_block import OPTIONS, FastBlock, fast_class
from dinov2_fast.drop_in.half_block import (
    DropPathMode,
    HalfBlock,
    Options,
    full_name,
    is_rewritten,
)
from dinov2_fast.drop_in.report import Entry, Report
from dinov2_fast.nn.block import Block
from dinov2_fast.nn.branch_plan import RECOMPUTE_LEVELS, Recompute

_LIBRARIES = {
    "timm": timm.FastTimmBlock,
    "transformers": huggingface.FastHuggingFaceLayer,
    "official DINOv2": official.FastOfficialBlock,
}


def accelerate(
    model: nn.Module, *, drop_path: DropPathMode = "subset", recompute: Recompute = "none"
) -> Report:
    """Make the transformer blocks of a model faster and leaner, in place.

    Parameters, state-dict keys, hooks on blocks and the model's interface stay as they are. Call it
    before `fully_shard`; calling it again reports anew.

    Args:
        model: a timm VisionTransformer, a transformers Dinov2 model or DINOv2's own; or a model
            that contains one.
        drop_path: `subset` computes each half, in training, for a fixed number of samples drawn
            anew (b samples, m kept, weighted b / m); `masked` keeps every sample with its own
            probability, with the very draws of the library.
        recompute: what the backward pass computes anew instead of keeping it: `none`, `mlp`
            (the hidden layer) or `block` (queries, keys and values too).
    Returns:
        What was replaced, what was left and why; print it.
    Raises:
        TypeError: not a module.
        ValueError: no block of a known library in the model, or an unknown option.
    """
    _check_module("accelerate", model)
    if drop_path not in ("subset", "masked"):
        raise ValueError(f"accelerate: expected drop_path subset or masked, got {drop_path!r}")
    if recompute not in RECOMPUTE_LEVELS:
        levels = ", ".join(RECOMPUTE_LEVELS)
        raise ValueError(f"accelerate: expected recompute to be one of {levels}, got {recompute!r}")
    found = [
        (name, block, library)
        for name, block in model.named_modules()
        if (library := _library_of(block))
    ]
    if not found:
        raise ValueError(_why_nothing(model))
    options = Options(drop_path=drop_path, recompute=recompute)
    entries: dict[str, list[Entry]] = {"replaced": [], "skipping": [], "left": []}
    dropping, sizes = False, set[tuple[int, str, bool]]()
    for name, block, library in found:
        halves = _LIBRARIES[library].halves(block)
        reasons = [_why_left(block, half, library) for half in halves]
        for half, reason in zip(halves, reasons, strict=True):
            kind, reason = ("left", reason) if reason else _path_of(half)
            label = "attention" if half.kind == "attention" else "feed-forward"
            entries[kind].append(Entry(name or "model", label, reason))
            dropping |= half.drop_ratio > 0
            if kind != "left":
                weight = half.norm.weight
                sizes.add((weight.shape[0], weight.device.type, kind == "replaced"))
        if not all(reasons):
            _exchange(block, _LIBRARIES[library], options)
    for name, block in model.named_modules():
        if _is_subclassed(block):
            reason = f"the block is a {full_name(type(block))}, a subclass of its library's"
            entries["left"] += [Entry(name, half, reason) for half in ("attention", "feed-forward")]
    return Report(
        library=" and ".join(dict.fromkeys(library for _, _, library in found)),
        replaced=tuple(entries["replaced"]),
        skipping=tuple(entries["skipping"]),
        left=tuple(entries["left"]),
        notes=_notes(options, sizes, dropping=dropping),
    )


def restore(model: nn.Module) -> int:
    """Give every accelerated block its library's class back.

    Args:
        model: what `accelerate` was given, or a part or copy of it.
    Returns:
        How many blocks were restored; 0 if none was accelerated.
    Raises:
        TypeError: not a module.
        ValueError: a block was wrapped by something else in the meantime.
    """
    _check_module("restore", model)
    blocks = [m for m in model.modules() if isinstance(m, FastBlock)]
    for block in blocks:
        if not _is_accelerated(block):
            raise ValueError(
                f"restore: expected blocks as accelerate left them, got a {full_name(type(block))} "
                "around one; restore before fully_shard, or rebuild the model"
            )
    for block in blocks:
        block.__class__ = type(block).original  # pyright: ignore[reportAttributeAccessIssue]
        delattr(block, OPTIONS)
    return len(blocks)


def _check_module(name: str, model: nn.Module) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected model to be an nn.Module, got {type(model).__name__}")


def _library_of(block: nn.Module) -> str:
    """The library of a block, accelerated already or not; "" for any other module."""
    kind = _class_of(block)
    name = full_name(kind)
    if name in timm.BLOCKS:
        return "timm"
    if name in huggingface.BLOCKS:
        return "transformers"
    ours = name.startswith("dinov2_fast.")
    return "official DINOv2" if official.is_official_block(block, kind) and not ours else ""


def _why_nothing(model: nn.Module) -> str:
    """What to tell somebody whose model has no block that `accelerate` knows."""
    for module in model.modules():
        if isinstance(module, Block):
            return (
                f"accelerate: expected another library's model, got a {full_name(type(model))}, "
                "whose blocks are fast as they are"
            )
        if _is_subclassed(module):
            return (
                "accelerate: expected blocks as their library made them, got a "
                f"{full_name(type(module))}, a subclass of one; accelerate before fully_shard, or "
                "give blocks their library's class"
            )
    return (
        "accelerate: expected a model with timm's Block, transformers' Dinov2Layer (with registers "
        f"or not) or a block of DINOv2's code, got a {full_name(type(model))} without any, which "
        "stays as it is; a ViT of your own can be built from dinov2_fast.nn"
    )


def _is_subclassed(module: nn.Module) -> bool:
    """Whether a module is of a subclass of a known block that somebody else than we made."""
    if isinstance(module, FastBlock) and _is_accelerated(module):
        return False
    known = timm.BLOCKS | huggingface.BLOCKS
    return any(full_name(base) in known for base in type(module).__mro__[1:])


def _is_accelerated(block: nn.Module) -> bool:
    """Whether a block's class is exactly one that `fast_class` made."""
    kind = type(block)
    return isinstance(block, FastBlock) and "original" in vars(kind)


def _class_of(block: nn.Module) -> type[nn.Module]:
    """The class that a block's library gave it."""
    if isinstance(block, FastBlock) and _is_accelerated(block):
        return block.original
    return type(block)


def _why_left(block: nn.Module, half: HalfBlock, library: str) -> str:
    """Why a half stays as it is, or ""."""
    if "forward" in vars(block):
        return "the block has a forward of its own"
    if is_rewritten(_class_of(block)):
        return "the block computes by a forward that is not its library's"
    reason = half.why_left()
    if reason or library != "official DINOv2" or _is_accelerated(block):
        return reason
    same = official.computes_the_same(block)
    return "" if same else "the block computes something else than DINOv2's"


def _path_of(half: HalfBlock) -> tuple[str, str]:
    """Whether a half owns its memory, only skips samples or has none to skip, and why."""
    reason = half.why_not_owned(half.second.weight)
    if not reason:
        return "replaced", ""
    return ("skipping" if half.drop_ratio > 0 else "left"), reason


def _exchange(block: nn.Module, fast: type[FastBlock], options: Options) -> None:
    """Give a block its faster class."""
    if not _is_accelerated(block):
        block.__class__ = fast_class(fast, type(block))
    setattr(block, OPTIONS, options)


def _notes(
    options: Options, sizes: set[tuple[int, str, bool]], *, dropping: bool
) -> tuple[str, ...]:
    """What a user should know besides which blocks changed.

    `sizes` are channels, device and whether the halves of this kind can own their memory.
    """
    notes: list[str] = []
    if dropping and options.drop_path == "subset":
        notes.append(
            "drop path keeps a fixed number of samples, drawn anew by each half, and weights them "
            "so that the expectation is the library's; drop_path='masked' keeps the library's draws"
        )
    if dropping:
        notes.append("under torch.compile and torch.export blocks and drop path are the library's")
    notes += [
        limits.in_words(channels, device, owning=owning, dropping=dropping)
        for channels, device, owning in sorted(sizes)
    ]
    if sizes:
        notes.append("second derivatives and torch.jit.script need restore(model)")
    return tuple(notes)
