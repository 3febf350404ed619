"""A pre-norm transformer block on packed tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dinov2_fast import environment
from dinov2_fast.nn.attention import Attention, MemEffAttention, as_packed
from dinov2_fast.nn.branch_plan import (
    RECOMPUTE_LEVELS,
    BranchPlan,
    Recompute,
    wanted_queries,
    wanted_rows,
)
from dinov2_fast.nn.layer_norm import LayerNorm
from dinov2_fast.nn.layer_scale import LayerScale
from dinov2_fast.nn.linear import Linear
from dinov2_fast.nn.mlp import Mlp
from dinov2_fast.nn.module_calls import compute_dtype, has_hooks
from dinov2_fast.nn.residual_branch import AttentionBranch, FeedForwardBranch
from dinov2_fast.nn.stochastic_depth import add_branch
from dinov2_fast.nn.swiglu import SwiGLUFFN
from dinov2_fast.ops.stochastic_depth import draw_kept_rows
from dinov2_fast.packing import Pack

FFN_LAYERS: dict[str, type[Mlp] | type[SwiGLUFFN]] = {"mlp": Mlp, "swiglu": SwiGLUFFN}

# Modules whose arithmetic the memory-owning branches know. Another type in their place (an adapter,
# a quantised layer), a hook or a parametrisation is called instead, on the plain path.
_KNOWN = (
    *(Attention, MemEffAttention, LayerNorm, LayerScale, Mlp, SwiGLUFFN),
    *(Linear, nn.Linear, nn.Identity),
)


class Block(nn.Module):
    """Attention and feed-forward, each with norm, LayerScale and stochastic depth of its own.

    Args:
        dim: C, channels.
        num_heads: H; must divide C.
        mlp_ratio: hidden width of the MLP over C; SwiGLU takes two thirds of it.
        ffn: feed-forward layer, `mlp` or `swiglu`.
        drop_ratio: share of the samples that each branch skips in training, in [0, 1).
        layer_scale: initial value of the LayerScale vectors; None leaves them out.
        qkv_bias: whether queries, keys and values have a bias.
        eps: of both norms.
        recompute: what the backward pass computes anew instead of keeping it: `none`, `mlp` (the
            hidden layer) or `block` (queries, keys and values too). It has no effect where
            the block runs module by module: with hooks, adapters, `torch.compile` or
            DINOV2_FAST_BLOCK=plain.
    Raises:
        ValueError: unknown ffn or recompute, or a drop_ratio outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        drop_ratio: float = 0.0,
        layer_scale: float | None = 1e-5,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE_LEVELS:
            raise ValueError(
                f"block: expected recompute to be one of {', '.join(RECOMPUTE_LEVELS)}, "
                f"got {recompute}"
            )
        if ffn not in FFN_LAYERS:
            raise ValueError(f"block: expected ffn to be one of {', '.join(FFN_LAYERS)}, got {ffn}")
        if not 0 <= drop_ratio < 1:
            raise ValueError(f"block: expected drop_ratio in [0, 1), got {drop_ratio}")
        self.drop_ratio = drop_ratio
        self.recompute: Recompute = recompute
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.ls1 = _layer_scale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = FFN_LAYERS[ffn](dim, int(dim * mlp_ratio))
        self.ls2 = _layer_scale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        pack: Pack | None = None,
        *,
        generator: torch.Generator | None = None,
        inplace: bool = False,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Run both branches; in training each draws the samples it keeps, per group of the pack.

        Args:
            x: [T, C] tokens of a pack, or [B, N, C] without one.
            pack: layout of x.
            generator: CPU generator of the draws; None draws from torch's global one.
            inplace: whether the buffer of x may be overwritten; nobody else may hold it.
            wanted: [W] int64 rows that are read afterwards, none twice; the others may come out
                unfinished. None is all of them.
        Returns:
            The shape of x.
        Raises:
            ValueError: x does not fit the pack.
        """
        tokens, pack = as_packed(x, pack, name="block")
        drop_ratio = self.drop_ratio if self.training else 0.0
        if self._owns_memory(tokens):
            tokens = self._run_branches(
                tokens if inplace else tokens.clone(), pack, drop_ratio, generator, wanted
            )
        else:
            tokens = self._add_branches(tokens, pack, drop_ratio, generator)
        return tokens.view(x.shape)

    def _run_branches(
        self,
        x: Tensor,
        pack: Pack,
        drop_ratio: float,
        generator: torch.Generator | None,
        wanted: Tensor | None,
    ) -> Tensor:
        """Both branches as autograd nodes that own their memory; changes x."""

        def plan(norm: LayerNorm) -> BranchPlan:
            kept = draw_kept_rows(pack, drop_ratio, generator)
            return BranchPlan(
                pack=pack if kept is None else kept.pack,
                kept=kept,
                eps=norm.eps,
                dtype=compute_dtype(x),
                num_heads=self.attn.num_heads,
                head_dim=self.attn.head_dim,
                swiglu=isinstance(self.mlp, SwiGLUFFN),
                recompute=self.recompute,
            )

        attention_plan, mlp_plan = plan(self.norm1), plan(self.norm2)
        if wanted is not None and x.device.type == "cpu":  # elsewhere counting rows would wait
            attention_plan = wanted_queries(attention_plan, wanted, x.shape[0])
            mlp_plan = wanted_rows(mlp_plan, wanted, x.shape[0])
        attn, mlp = self.attn, self.mlp
        first, second = (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLUFFN) else (mlp.fc1, mlp.fc2)
        layers = (attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias)
        x = AttentionBranch.apply(  # pyright: ignore[reportAssignmentType]
            x, self.norm1.weight, self.norm1.bias, *layers, _gamma(self.ls1), attention_plan
        )
        layers = (first.weight, first.bias, second.weight, second.bias)
        return FeedForwardBranch.apply(  # pyright: ignore[reportReturnType]
            x, self.norm2.weight, self.norm2.bias, *layers, _gamma(self.ls2), mlp_plan
        )

    def _add_branches(
        self, x: Tensor, pack: Pack, drop_ratio: float, generator: torch.Generator | None
    ) -> Tensor:
        """Both branches as a composition of modules under plain autograd; x stays as it is."""
        x = add_branch(
            x,
            pack,
            self.norm1,
            self.attn,
            _gamma(self.ls1),
            drop_ratio=drop_ratio,
            generator=generator,
        )
        return add_branch(
            x,
            pack,
            self.norm2,
            self._feed_forward,
            _gamma(self.ls2),
            drop_ratio=drop_ratio,
            generator=generator,
        )

    def _owns_memory(self, x: Tensor) -> bool:
        """Whether the branches run as nodes that own their memory, rather than module by module.

        A compiler sees plain operations; a caller's hooks, adapters and other types are respected.
        """
        if torch.compiler.is_compiling() or environment.plain_blocks():
            return False
        if x.dtype not in (torch.float32, torch.float64) or x.is_meta:
            return False
        modules = (module for child in self.children() for module in child.modules())
        return all(_is_plain(module) for module in modules) and all(
            parameter.dtype == x.dtype for parameter in self.parameters()
        )

    def _feed_forward(self, x: Tensor, _pack: Pack) -> Tensor:
        return self.mlp(x)


def _layer_scale(dim: int, init_value: float | None) -> nn.Module:
    return nn.Identity() if init_value is None else LayerScale(dim, init_value=init_value)


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its type says and nothing else."""
    return type(module) in _KNOWN and not has_hooks(module)
