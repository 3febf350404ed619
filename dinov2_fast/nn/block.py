"""A pre-norm transformer block on packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import environment
from dinov2_fast.nn.attention import Attention
from dinov2_fast.nn.branch_plan import (
    RECOMPUTE_LEVELS,
    BranchPlan,
    Recompute,
    wanted_queries,
    wanted_rows,
)
from dinov2_fast.nn.input_forms import as_packed, run_as_one_pack
from dinov2_fast.nn.layer_norm import LayerNorm
from dinov2_fast.nn.layer_scale import LayerScale
from dinov2_fast.nn.linear import Linear
from dinov2_fast.nn.mlp import Mlp
from dinov2_fast.nn.module_calls import compute_dtype, has_hooks
from dinov2_fast.nn.residual_branch import AttentionBranch, FeedForwardBranch
from dinov2_fast.nn.stochastic_depth import add_branch
from dinov2_fast.nn.swiglu import SwiGLUFFN, SwiGLUFFNFused
from dinov2_fast.ops.stochastic_depth import draw_kept_rows
from dinov2_fast.packing import Pack

# Modules whose arithmetic the memory-owning branches know. Another type in their place (an adapter,
# a quantised layer), a hook or a parametrisation is called instead, on the plain path.
_KNOWN = (
    *(Attention, LayerNorm, LayerScale, Mlp, SwiGLUFFN, SwiGLUFFNFused),
    *(Linear, nn.Linear, nn.Identity),
)


class Block(nn.Module):
    """Attention and feed-forward, each with norm, LayerScale and stochastic depth of its own.

    Args:
        dim: C, channels.
        num_heads: H; must divide C.
        mlp_ratio: what the feed-forward layer is told as its hidden width, over C.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether attention's output projection has one.
        ffn_bias: whether the feed-forward layers have one.
        drop: dropout, 0.
        attn_drop: dropout of attention weights, 0.
        init_values: initial value of the LayerScale vectors; None or 0 leaves them out.
        drop_path: share of the samples that each branch skips in training, in [0, 1).
        act_layer: nn.GELU.
        norm_layer: makes a LayerNorm of dim, torch's or ours; its eps is taken over.
        attn_class: Attention, whose other name is MemEffAttention.
        ffn_layer: Mlp, SwiGLUFFN or SwiGLUFFNFused.
        recompute: what the backward pass computes anew instead of keeping it: `none`, `mlp` (the
            hidden layer) or `block` (queries, keys and values too). It has no effect where
            the block runs module by module: with hooks, adapters, `torch.compile` or
            DINOV2_FAST_BLOCK=plain.
    Raises:
        ValueError: another layer, a dropout, an unknown recompute, or a drop_path outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., Any] = nn.LayerNorm,
        attn_class: type[nn.Module] = Attention,
        ffn_layer: type[nn.Module] = Mlp,
        *,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE_LEVELS:
            raise ValueError(
                f"block: expected recompute to be one of {', '.join(RECOMPUTE_LEVELS)}, "
                f"got {recompute}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"block: expected drop_path in [0, 1), got {drop_path}")
        if attn_class is not Attention or ffn_layer not in (Mlp, SwiGLUFFN, SwiGLUFFNFused):
            raise ValueError(
                "block: expected attn_class Attention and ffn_layer Mlp, SwiGLUFFN or "
                f"SwiGLUFFNFused of dinov2_fast.nn, got {attn_class} and {ffn_layer}; "
                "call other layers in a block of your own, and dinov2_fast.nn.DropPath"
            )
        eps = _eps_of(norm_layer, dim)
        self.drop_ratio = drop_path
        self.recompute: Recompute = recompute
        self.norm1 = LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop=drop)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = ffn_layer(
            dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        pack: Pack | None = None,
        *,
        return_attention: bool = False,
        generator: torch.Generator | None = None,
        inplace: bool = False,
        wanted: Tensor | None = None,
    ) -> Any:
        """Run both branches; in training each draws the samples it keeps, per group of the pack.

        Args:
            x: [B, N, C], [T, C] tokens of a pack, or a list of [B_i, N_i, C].
            pack: layout of [T, C].
            return_attention: give the attention probabilities instead, which the block computes
                without storing them.
            generator: CPU generator of the draws; None draws from torch's global one.
            inplace: whether the buffer of x may be overwritten; nobody else may hold it.
            wanted: [W] int64 rows that are read afterwards, none twice; the others may come out
                unfinished. None is all of them.
        Returns:
            The shape of x, a list for a list; or [B, H, N, N], for a pack or a list one for each
            group.
        Raises:
            TypeError: neither a tensor nor a list of tensors.
            ValueError: x does not fit the pack, or batches do not fit each other.
        """
        if not isinstance(x, Tensor):
            options: dict[str, Any] = {"return_attention": return_attention, "wanted": wanted}
            return run_as_one_pack(
                self.forward, x, pack, name="block", generator=generator, inplace=True, **options
            )
        if return_attention:
            return self.attn(self.norm1(x), pack, return_attention=True)
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


def _eps_of(norm_layer: Callable[..., Any], dim: int) -> float:
    """The eps of the LayerNorm that a caller asks for."""
    norm = norm_layer(dim)
    if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None or norm.bias is None:
        raise ValueError(
            "block: expected norm_layer to make a LayerNorm with weight and bias, torch's or "
            f"dinov2_fast.nn's, got {norm_layer}; call other layers in a block of your own"
        )
    return norm.eps


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its type says and nothing else."""
    return type(module) in _KNOWN and not has_hooks(module)


NestedTensorBlock = Block  # DINOv2's name for the block that takes lists
