"""Half-blocks that own their memory: `x += gamma * branch(norm(x))` as one autograd node each.

The residual stream is updated in place and its gradient is one buffer for the whole depth. A branch
keeps, for its kept rows only: the norm's output and reciprocal deviation; queries, keys, values,
attention output and, on a GPU, log-sum-exp; or the hidden pre-activation. What is left out comes
back in the backward pass: the norm's input from its output, LayerScale's gradient from that of the
projection's weight, the activation from its input.

A tensor hook on the stream between two blocks sees that one buffer: it must copy the gradient it
keeps, since the branches below overwrite it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.nn.branch_plan import BranchPlan
from dinov2_fast.ops import _matmul as matmul
from dinov2_fast.ops._attention_kernels import backward_reads_lse
from dinov2_fast.ops.attention import attention_backward, attention_forward
from dinov2_fast.ops.gelu import gelu, gelu_backward_
from dinov2_fast.ops.layer_norm import can_rebuild, layer_norm_backward_, layer_norm_forward
from dinov2_fast.ops.stochastic_depth import gather_scaled, scatter_add_scaled_
from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_
from dinov2_fast.packing import Pack


class AttentionBranch(torch.autograd.Function):
    """`x += scale * gamma * proj(attention(qkv(norm(x))))` on the kept rows, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        gamma: Tensor | None,
        plan: BranchPlan,
    ) -> Tensor:
        """The stream x [T, C], changed in place."""
        parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma)
        ctx.rebuild = _rebuilds(norm_weight, norm_bias)
        normed, y, rstd = _norm_forward(x, norm_weight, norm_bias, plan, ctx.rebuild)  # [R, C]
        projected = _project(y, qkv_weight, qkv_bias, plan)
        q, k, v = _heads(projected, plan)
        layout = {"scale": plan.head_dim**-0.5, "q_pack": _query_pack(plan)}
        out, lse = attention_forward(q, k, v, plan.pack, **layout)
        kept_lse = lse if backward_reads_lse(q, k, v, plan.pack, **layout) else None
        branch = matmul.linear(out.flatten(1), proj_weight, proj_bias)  # [R, C]
        scatter_add_scaled_(x, branch, *plan.output, gamma)
        if plan.recompute == "block":
            projected = (None, None)
        _keep(ctx, x, plan, parameters, (normed, rstd, out, kept_lse, *projected))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of the stream and of every parameter."""
        plan, parameters, (normed, rstd, out, lse, *projected) = _kept(ctx)
        norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma = parameters
        stream = _owned(grad)
        g, sums = gather_scaled(stream, *plan.output, out_dtype=out.dtype)  # [R, C]
        frozen = not (ctx.needs_input_grad[5] or ctx.needs_input_grad[7])
        second = (proj_weight, proj_bias, gamma)
        d_proj = _scaled_weight_gradients(g, sums, out.flatten(1), *second, frozen=frozen)
        d_out = matmul.input_gradient(g, _scaled_rows(proj_weight, gamma)).view(out.shape)
        y = _norm_output(normed, norm_weight, norm_bias, ctx.rebuild)
        if plan.recompute == "block":
            projected = _project(y, qkv_weight, qkv_bias, plan)
        q, k, v = _heads(projected, plan)
        d_projected = tuple(None if part is None else torch.empty_like(part) for part in projected)
        d_q, d_k, d_v = _heads(d_projected, plan)
        attention_backward(
            d_out,
            q,
            k,
            v,
            lse,
            plan.pack,
            scale=plan.head_dim**-0.5,
            out=out,
            q_pack=_query_pack(plan),
            d_q=d_q,
            d_k=d_k,
            d_v=d_v,
        )
        frozen = not ctx.needs_input_grad[3]
        d_y, d_qkv = _project_backward(d_projected, y, qkv_weight, qkv_bias, plan, frozen=frozen)
        norm = (normed, rstd, norm_weight, norm_bias)
        d_norm = _norm_backward_(stream, d_y, norm, plan, ctx.rebuild)
        return stream, *d_norm, *d_qkv, *d_proj, None


class FeedForwardBranch(torch.autograd.Function):
    """`x += scale * gamma * second(activation(first(norm(x))))` on the kept rows, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second_weight: Tensor,
        second_bias: Tensor | None,
        gamma: Tensor | None,
        plan: BranchPlan,
    ) -> Tensor:
        """The stream x [T, C], changed in place."""
        parameters = (
            norm_weight,
            norm_bias,
            first_weight,
            first_bias,
            second_weight,
            second_bias,
            gamma,
        )
        ctx.rebuild = _rebuilds(norm_weight, norm_bias)
        normed, y, rstd = _norm_forward(x, norm_weight, norm_bias, plan, ctx.rebuild)  # [R, C]
        hidden = matmul.linear(y, first_weight, first_bias)  # [R, F] or [R, 2F]
        activation = swiglu(hidden) if plan.swiglu else gelu(hidden)  # [R, F]
        branch = matmul.linear(activation, second_weight, second_bias)  # [R, C]
        scatter_add_scaled_(x, branch, *plan.output, gamma)
        _keep(
            ctx,
            x,
            plan,
            parameters,
            (normed, rstd, hidden if plan.recompute == "none" else None),
        )
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of the stream and of every parameter."""
        plan, parameters, (normed, rstd, hidden) = _kept(ctx)
        norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, gamma = (
            parameters
        )
        stream = _owned(grad)
        y = _norm_output(normed, norm_weight, norm_bias, ctx.rebuild)
        # A copy, since a caller that retains the graph may come back.
        kept = hidden
        hidden = matmul.linear(y, first_weight, first_bias) if kept is None else kept.clone()
        g, sums = gather_scaled(stream, *plan.output, out_dtype=y.dtype)  # [R, C]
        activation = matmul.input_gradient(g, _scaled_rows(second_weight, gamma))  # d_activation
        backward_ = swiglu_backward_ if plan.swiglu else gelu_backward_
        d_first_bias = backward_(activation, hidden)  # activation and d_hidden from here on
        frozen = not (ctx.needs_input_grad[5] or ctx.needs_input_grad[7])
        second = (second_weight, second_bias, gamma)
        d_second = _scaled_weight_gradients(g, sums, activation, *second, frozen=frozen)
        d_first_weight = None
        if ctx.needs_input_grad[3]:
            d_first_weight = matmul.weight_gradient(hidden, y, first_weight)
        d_y = matmul.input_gradient(hidden, first_weight)
        norm = (normed, rstd, norm_weight, norm_bias)
        d_norm = _norm_backward_(stream, d_y, norm, plan, ctx.rebuild)
        if first_bias is None:
            return stream, *d_norm, d_first_weight, None, *d_second, None
        return stream, *d_norm, d_first_weight, d_first_bias.to(first_bias.dtype), *d_second, None


def _project(
    y: Tensor, weight: Tensor, bias: Tensor | None, plan: BranchPlan
) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values [R, 3C] and None; or, for chosen queries, [Q, C] and [R, 2C]."""
    if plan.queries is None:
        return matmul.linear(y, weight, bias), None
    dim = y.shape[1]
    query_bias, rest_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
    queries = matmul.linear(y.index_select(0, plan.queries), weight[:dim], query_bias)
    return queries, matmul.linear(y, weight[dim:], rest_bias)


def _project_backward(
    gradients: tuple[Any, ...],
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: BranchPlan,
    *,
    frozen: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradients of y, and of weight (unless it is frozen) and bias, out of what `_project` gave."""
    d_first, d_rest = gradients
    if plan.queries is None:
        d_bias = None if bias is None else d_first.sum(0, dtype=bias.dtype)
        d_weight = None if frozen else matmul.weight_gradient(d_first, y, weight)
        return matmul.input_gradient(d_first, weight), (d_weight, d_bias)
    dim = y.shape[1]
    d_weight = None
    if not frozen:
        d_weight = torch.empty_like(weight)
        d_weight[:dim] = matmul.weight_gradient(d_first, y.index_select(0, plan.queries), weight)
        d_weight[dim:] = matmul.weight_gradient(d_rest, y, weight)
    d_y = matmul.input_gradient(d_rest, weight[dim:])
    d_y.index_add_(0, plan.queries, matmul.input_gradient(d_first, weight[:dim]))
    if bias is None:
        return d_y, (d_weight, None)
    sums = [part.sum(0, dtype=bias.dtype) for part in (d_first, d_rest)]
    return d_y, (d_weight, torch.cat(sums))


def _heads(projected: Any, plan: BranchPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [., H, D] as views of what `_project` gave."""
    first, rest = projected
    if rest is None:
        q, k, v = first.view(first.shape[0], 3, plan.num_heads, plan.head_dim).unbind(1)
        return q, k, v
    k, v = rest.view(rest.shape[0], 2, plan.num_heads, plan.head_dim).unbind(1)
    return first.view(first.shape[0], plan.num_heads, plan.head_dim), k, v


def _query_pack(plan: BranchPlan) -> Pack | None:
    """Layout of the queries where it is not that of the keys."""
    return None if plan.query_rows is None else plan.query_rows.pack


def _keep(
    ctx: Any,
    x: Tensor,
    plan: BranchPlan,
    parameters: tuple[Tensor | None, ...],
    activations: tuple[Tensor | None, ...],
) -> None:
    """Note for the backward pass; x is the buffer that changed."""
    ctx.mark_dirty(x)
    ctx.save_for_backward(*parameters, *activations)
    ctx.plan, ctx.num_parameters = plan, len(parameters)


def _kept(ctx: Any) -> tuple[BranchPlan, tuple[Any, ...], tuple[Any, ...]]:
    """What `_keep` noted: plan, parameters, activations."""
    saved = ctx.saved_tensors
    return ctx.plan, saved[: ctx.num_parameters], saved[ctx.num_parameters :]


def _owned(grad: Tensor) -> Tensor:
    """The stream's gradient as a buffer that may be overwritten.

    A branch hands its own buffer down, marked; any other tensor may belong to somebody else and is
    copied once, at the top of the network.
    """
    if getattr(grad, "_dinov2_fast_stream", False):
        return grad
    stream = grad.clone(memory_format=torch.contiguous_format)
    stream._dinov2_fast_stream = True  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def _norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, plan: BranchPlan, rebuild: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of the norm (its output, or the normalised rows), its output, and 1 / deviation.

    The normalised rows are kept where the input cannot be rebuilt from the output; the output is
    then made of them again.
    """
    if rebuild:
        y, rstd = layer_norm_forward(
            x, weight, bias, eps=plan.eps, rows=plan.rows, out_dtype=plan.dtype
        )
        return y, y, rstd
    ones, zeros = torch.ones_like(weight), torch.zeros_like(bias)
    normalised, rstd = layer_norm_forward(
        x, ones, zeros, eps=plan.eps, rows=plan.rows, out_dtype=plan.dtype
    )
    return normalised, _norm_output(normalised, weight, bias, rebuild), rstd


def _norm_output(normed: Tensor, weight: Tensor, bias: Tensor, rebuild: bool) -> Tensor:
    """The norm's output out of what `_norm_forward` kept."""
    if rebuild:
        return normed
    # In the weight's type, and rounded on the way out: no copy of the rows in that type.
    return torch.addcmul(bias, normed, weight, out=torch.empty_like(normed))


def _norm_backward_(
    stream: Tensor, d_y: Tensor, parts: tuple[Tensor, ...], plan: BranchPlan, rebuild: bool
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the norm's input to the stream's; the gradients of weight and bias.

    `parts` are what was kept, 1 / deviation, weight and bias.
    """
    normed, rstd, weight, bias = parts
    return layer_norm_backward_(
        stream,
        d_y,
        normed,
        rstd,
        weight,
        bias,
        rows=plan.rows,
        normalised=None if rebuild else normed,
    )


def _rebuilds(weight: Tensor, bias: Tensor) -> bool:
    """Whether the norm's input comes back from its output; on a GPU asking would wait for it."""
    return weight.device.type == "cpu" and can_rebuild(weight, bias)


def _scaled_rows(weight: Tensor, gamma: Tensor | None) -> Tensor:
    """`gamma[:, None] * weight`: LayerScale folded into the projection before it."""
    return weight if gamma is None else weight * gamma.unsqueeze(1)


def _scaled_weight_gradients(
    g: Tensor,
    sums: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    *,
    frozen: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and gamma; that of gamma needs no output of the branch.

    With G = g.T @ x the gradient of `weight` is gamma * G and that of gamma is the sum of
    `weight * G` over inputs, plus the bias's part. Where weight and gamma are frozen, G, a third of
    the layer's work, is not computed.
    """
    sums = sums.to(weight.dtype)
    if frozen:
        d_bias = sums if gamma is None else gamma * sums
        return None, None if bias is None else d_bias, None
    raw = matmul.weight_gradient(g, x, weight)  # [O, I]
    if gamma is None:
        return raw, None if bias is None else sums, None
    d_gamma = torch.linalg.vecdot(raw, weight)
    if bias is not None:
        d_gamma = d_gamma + bias * sums
    raw.mul_(gamma.unsqueeze(1))
    return raw, None if bias is None else gamma * sums, d_gamma
