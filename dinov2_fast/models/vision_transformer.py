"""DINOv2's vision transformer: images of one or several sizes to tokens, in one pass.

Several batches of crops run as one pack: their tokens lie in one [T, C] tensor from the first block
to the last, and attention never crosses a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from dinov2_fast.models.position_embedding import RESIZE_MODES, resize_position_embedding
from dinov2_fast.nn import Block, LayerNorm, LayerScale, Mlp, PatchEmbed, SwiGLUFFNFused
from dinov2_fast.packing import Pack, pack_tokens, unpack_tokens

FFN_LAYERS: dict[str, type[nn.Module]] = {"mlp": Mlp, "swiglu": SwiGLUFFNFused}


class TokenFeatures(TypedDict):
    """What the backbone says about a batch of images of one size."""

    x_norm_clstoken: Tensor
    """[B, C] after the final norm."""
    x_norm_regtokens: Tensor
    """[B, registers, C] after the final norm."""
    x_norm_patchtokens: Tensor
    """[B, N, C] after the final norm, patches in row-major order."""
    x_prenorm: Tensor
    """[B, 1 + registers + N, C] before the final norm."""
    masks: Tensor | None
    """The masks that were given."""


class VisionTransformer(nn.Module):
    """A ViT with the parameter names, token order and outputs of official DINOv2.

    Args:
        image_px: side of the square image whose patches the position embeddings stand for.
        patch_size: side of a patch in pixels.
        in_channels: channels of an image.
        embed_dim: C.
        depth: number of blocks.
        num_heads: H.
        mlp_ratio: hidden width of the MLP over C; SwiGLU takes two thirds of it.
        ffn: feed-forward layer, `mlp` or `swiglu`.
        num_registers: register tokens, between CLS and the patches and without a position.
        drop_ratio: share of the samples each residual branch skips in training, the same in
            every block.
        layer_scale: initial value of the LayerScale vectors; 0 leaves them out.
        position_resize: see `resize_position_embedding`.
        recompute: what blocks compute anew in the backward pass instead of keeping it; module by
            module (hooks, adapters, torch.compile) it has no effect.
    Raises:
        ValueError: numbers that do not make a model.
    """

    def __init__(
        self,
        *,
        image_px: int = 518,
        patch_size: int = 14,
        in_channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        num_registers: int = 0,
        drop_ratio: float = 0.0,
        layer_scale: float = 1e-5,
        position_resize: Literal["official", "antialias"] = "official",
        recompute: Literal["none", "mlp", "block"] = "none",
    ) -> None:
        super().__init__()
        if min(embed_dim, depth, patch_size, in_channels) < 1 or num_registers < 0:
            raise ValueError(
                "vision_transformer: expected embed_dim, depth, patch_size and in_channels of at "
                f"least 1 and num_registers of at least 0, got {embed_dim}, {depth}, {patch_size}, "
                f"{in_channels} and {num_registers}"
            )
        if position_resize not in RESIZE_MODES:
            raise ValueError(
                f"vision_transformer: expected position_resize to be one of "
                f"{', '.join(RESIZE_MODES)}, got {position_resize!r}"
            )
        if ffn not in FFN_LAYERS or not 0 <= drop_ratio < 1:
            raise ValueError(
                f"vision_transformer: expected ffn to be one of {', '.join(FFN_LAYERS)} and "
                f"drop_ratio in [0, 1), got {ffn!r} and {drop_ratio}"
            )
        self.image_px = image_px
        self.patch_size = patch_size
        self.embed_dim = self.num_features = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.ffn = ffn
        self.num_registers = num_registers
        self.drop_ratio = drop_ratio
        self.position_resize: Literal["official", "antialias"] = position_resize
        self.patch_embed = PatchEmbed(image_px, patch_size, in_channels, embed_dim)
        rows, columns = self.patch_embed.grid_of(image_px, image_px)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                init_values=layer_scale,
                drop_path=drop_ratio,
                norm_layer=LayerNorm,
                ffn_layer=FFN_LAYERS[ffn],
                recompute=recompute,
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)
        if not self.cls_token.is_meta:  # nothing to draw, and drawing it imports torch's compiler
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, LayerNorm, LayerScale)):
                module.reset_parameters()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised CLS token.

        Args:
            x: [B, in_channels, H, W], H and W multiples of the patch size.
        Returns:
            [B, C].
        """
        return self.forward_features(x)["x_norm_clstoken"]

    @overload
    def forward_features(
        self, x: Tensor, masks: Tensor | None = None, generator: torch.Generator | None = None
    ) -> TokenFeatures: ...

    @overload
    def forward_features(
        self,
        x: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[TokenFeatures]: ...

    def forward_features(
        self, x: Any, masks: Any = None, generator: torch.Generator | None = None
    ) -> TokenFeatures | list[TokenFeatures]:
        """All tokens of a batch, or of several batches of different sizes computed as one pack.

        Args:
            x: [B, in_channels, H, W], or a sequence of such batches.
            masks: [B, N] bool, patches the mask token stands in for; for a sequence of batches a
                sequence with None where nothing is masked.
            generator: CPU generator of stochastic depth in training; None draws from torch's
                global one.
        Returns:
            The features, or one set for each batch.
        Raises:
            ValueError: images or masks of another shape.
        """
        if isinstance(x, Tensor):
            return self._packed_features([x], [masks], generator)[0]
        batches = list(x)
        per_batch = [None] * len(batches) if masks is None else list(masks)
        if len(per_batch) != len(batches):
            raise ValueError(
                f"forward_features: expected masks for {len(batches)} batches, got "
                f"{len(per_batch)}; use None where nothing is masked"
            )
        return self._packed_features(batches, per_batch, generator)

    def forward_selected(
        self,
        batches: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patch_indices: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens a pretraining loss reads: every CLS, and some patches of the first batch.

        Equal to picking them out of `forward_features`; on the CPU the last block computes queries,
        projection and feed-forward for these rows alone.

        Args:
            batches: [B_i, in_channels, H_i, W_i] each.
            masks: for each batch [B_i, N_i] bool or None.
            patch_indices: [M] int64 flat positions in [B_0 * N_0], none twice.
            generator: CPU generator of stochastic depth in training.
        Returns:
            CLS tokens [sum of B_i, C] and patches [M, C], after the final norm.
        """
        x, pack = pack_tokens([self._tokens(*pair) for pair in zip(batches, masks, strict=True)])
        first_patch = 1 + self.num_registers
        images = patch_indices // (pack.groups[0][1] - first_patch)  # by patches per image
        cls_rows = pack.offsets[:-1].long()
        # Before a patch stand the CLS and register tokens of its image and of all images before.
        rows = torch.cat([cls_rows, patch_indices + (images + 1) * first_patch])
        normed = self.norm(self._blocks(x, pack, generator, wanted=rows), rows=rows)
        return normed[: len(cls_rows)], normed[len(cls_rows) :]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        return_register_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]:
        """Outputs of several blocks.

        Args:
            x: [B, in_channels, H, W].
            n: the last n blocks, or the indices of blocks, first to last; -1 is the last block.
            reshape: give patches as maps [B, C, rows, columns].
            return_class_token: add [B, C].
            return_register_tokens: add [B, registers, C].
            norm: apply the final norm to every output taken.
        Returns:
            For each block the patches [B, N, C]; or, with any token asked for, a tuple of
            patches, class token and register tokens in this order.
        Raises:
            ValueError: no such block.
        """
        wanted = self._layer_indices(n)
        tokens, pack = pack_tokens([self._tokens(x, None)])
        rows, columns = self.patch_embed.grid_of(x.shape[2], x.shape[3])
        layers: list[Any] = []
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = block(tokens, pack)
            if index not in wanted:
                continue
            out = unpack_tokens(self.norm(tokens) if norm else tokens, pack)[0]
            cls_token, registers, patches = self._split(out)
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
            extra = [cls_token] * return_class_token + [registers] * return_register_tokens
            layers.append((patches, *extra) if extra else patches)
        return tuple(layers)

    def return_attention(self, x: Tensor, layer: int = -1) -> Tensor:
        """Attention probabilities of one block.

        Args:
            x: [B, in_channels, H, W].
            layer: index of the block; -1 is the last.
        Returns:
            [B, H, N, N] over all tokens [CLS, registers, patches]; row i is what token i reads
            and sums to 1.
        Raises:
            ValueError: no such block.
        """
        (last,) = self._layer_indices([layer])
        tokens, pack = pack_tokens([self._tokens(x, None)])
        for block in self.blocks[:last]:
            tokens = block(tokens, pack)
        return self.blocks[last](tokens, pack, return_attention=True)[0]

    def _packed_features(
        self,
        batches: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None,
    ) -> list[TokenFeatures]:
        """Run batches of different sizes through all blocks as one pack."""
        x, pack = pack_tokens([self._tokens(*pair) for pair in zip(batches, masks, strict=True)])
        x = self._blocks(x, pack, generator)  # [T, C]
        prenorm, normed = unpack_tokens(x, pack), unpack_tokens(self.norm(x), pack)
        features = []
        for before, after, mask in zip(prenorm, normed, masks, strict=True):
            cls_token, registers, patches = self._split(after)
            features.append(
                TokenFeatures(
                    x_norm_clstoken=cls_token,
                    x_norm_regtokens=registers,
                    x_norm_patchtokens=patches,
                    x_prenorm=before,
                    masks=mask,
                )
            )
        return features

    def _blocks(
        self,
        x: Tensor,
        pack: Pack,
        generator: torch.Generator | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """All blocks, on one buffer: x is overwritten, but for outputs that a hook may hold.

        The last block may leave rows that are not wanted unfinished.
        """
        inplace, last = True, len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            rows = wanted if index == last else None
            x = block(x, pack, generator=generator, inplace=inplace, wanted=rows)
            inplace = not block._forward_hooks
        return x

    def _tokens(self, x: Tensor, masks: Tensor | None) -> Tensor:
        """Images to the input of the first block: [B, 1 + registers + N, C]."""
        patches = self.patch_embed(x)  # [B, N, C]
        if masks is not None:
            if masks.shape != patches.shape[:2] or masks.dtype != torch.bool:
                raise ValueError(
                    f"forward_features: expected masks {tuple(patches.shape[:2])} of torch.bool, "
                    f"got {tuple(masks.shape)} of {masks.dtype}"
                )
            # Before the positions are added: a masked token still knows where it is.
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        grid = self.patch_embed.grid_of(x.shape[2], x.shape[3])
        positions = resize_position_embedding(self.pos_embed, grid, mode=self.position_resize)
        parts = [(self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)]
        if self.register_tokens is not None:
            parts.append(self.register_tokens.expand(x.shape[0], -1, -1))
        return torch.cat([*parts, patches + positions[:, 1:]], dim=1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CLS [B, C], registers and patches of tokens [B, 1 + registers + N, C]."""
        first_patch = 1 + self.num_registers
        return x[:, 0], x[:, 1:first_patch], x[:, first_patch:]

    def _layer_indices(self, n: int | Sequence[int]) -> list[int]:
        """Indices in [0, depth) of the last n blocks or of listed ones."""
        indices = range(-n, 0) if isinstance(n, int) else n
        if len(indices) == 0 or any(not -self.depth <= i < self.depth for i in indices):
            raise ValueError(
                f"layers: expected the last 1 to {self.depth} blocks or indices in "
                f"[{-self.depth}, {self.depth}), got {n}"
            )
        return [i % self.depth for i in indices]
