"""Operations of one step in matrix products: two a multiply-add, element-wise work left out."""

from __future__ import annotations

from dinov2_fast.bench.setting import StepSetting
from dinov2_fast.nn.swiglu import swiglu_hidden_features

_NUM_GLOBAL = 2
_TRAINED = 3  # forward, gradient of the input, gradient of the weight


def eager_flops(setting: StepSetting) -> float:
    """Of the eager reference: every branch for every sample, every token through the head.

    Patches of local crops meet the head in the forward pass alone: nothing reads them.

    Args:
        setting: what is computed.
    """
    (num_globals, global_length), (num_locals, local_length) = _groups(setting)
    depth = setting.architecture.depth
    teacher = depth * num_globals * _sequence(setting, global_length)
    student = teacher + depth * num_locals * _sequence(setting, local_length)
    global_tokens, local_tokens = num_globals * global_length, num_locals * local_length
    mlp, scores = _head(setting)
    head = (_TRAINED + 1) * global_tokens * (mlp + scores)
    head += _TRAINED * (local_tokens * mlp + num_locals * scores)
    head += (local_tokens - num_locals) * scores
    return _TRAINED * student + teacher + head + _patches(setting)


def fast_flops(setting: StepSetting) -> float:
    """Of the package's step, useful work alone: what the losses need and nothing recomputed.

    Residual branches for kept samples, the last block's rows that losses read, CLS and masked
    patches through the head.

    Args:
        setting: what is computed.
    """
    groups = _groups(setting)
    (num_globals, global_length), (num_locals, _) = groups
    depth = setting.architecture.depth
    masked = int(setting.block_masks()(0).sum())
    student_rows, teacher_rows = num_globals + num_locals + masked, num_globals + masked
    student = 0.0
    for (images, length), rows in zip(groups, (teacher_rows, num_locals), strict=True):
        kept = max(int(images * (1 - setting.drop_ratio)), 1)
        student += (depth - 1) * kept * _sequence(setting, length)
        student += kept / images * _last_block(setting, images, length, rows)
    teacher = (depth - 1) * num_globals * _sequence(setting, global_length)
    teacher += _last_block(setting, num_globals, global_length, teacher_rows)
    head = (_TRAINED * student_rows + teacher_rows) * sum(_head(setting))
    return _TRAINED * student + teacher + head + _patches(setting)


def _groups(setting: StepSetting) -> tuple[tuple[int, int], tuple[int, int]]:
    """(images, tokens of one) of the global and of the local crops."""
    _, _, crops = setting.configs()
    patch = setting.architecture.patch_size
    return (
        (_NUM_GLOBAL * setting.batch_size, 1 + (crops.global_px // patch) ** 2),
        (crops.num_local * setting.batch_size, 1 + (crops.local_px // patch) ** 2),
    )


def _sequence(setting: StepSetting, length: int) -> float:
    """A block for one sequence, forward."""
    return _attention(setting, length, length) + length * _token(setting)


def _attention(setting: StepSetting, queries: int, keys: int) -> float:
    """Scores and mixing, forward; the backward pass has twice as much, recomputed scores aside."""
    return 4.0 * queries * keys * setting.architecture.embed_dim


def _token(setting: StepSetting) -> float:
    """The linear layers of a block for one token: queries, keys, values, projection, the rest."""
    return 8.0 * setting.architecture.embed_dim**2 + _ffn(setting)


def _ffn(setting: StepSetting) -> float:
    shape = setting.architecture
    if shape.ffn == "mlp":
        return 4.0 * shape.embed_dim * 4 * shape.embed_dim
    return 6.0 * shape.embed_dim * swiglu_hidden_features(4 * shape.embed_dim)


def _last_block(setting: StepSetting, images: int, length: int, rows: int) -> float:
    """The last block when only some rows are read: keys and values of all, the rest of those."""
    square = setting.architecture.embed_dim**2
    keys_values = 4.0 * square * images * length
    one_row = 4.0 * square + _ffn(setting)  # query, projection, feed-forward
    return keys_values + rows * one_row + _attention(setting, rows, length)


def _head(setting: StepSetting) -> tuple[float, float]:
    """(MLP, prototypes) of one token."""
    _, loss, _ = setting.configs()
    head, dim = loss.dino_head, setting.architecture.embed_dim
    mlp = dim * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.bottleneck_dim
    return 2.0 * mlp, 2.0 * head.bottleneck_dim * head.num_prototypes


def _patches(setting: StepSetting) -> float:
    """Patch embedding: student forward and weight gradient, teacher forward."""
    shape = setting.architecture
    each = 2.0 * 3 * shape.patch_size**2 * shape.embed_dim
    (num_globals, global_length), (num_locals, local_length) = _groups(setting)
    patches = num_globals * (global_length - 1), num_locals * (local_length - 1)
    return each * (2 * sum(patches) + patches[0])
