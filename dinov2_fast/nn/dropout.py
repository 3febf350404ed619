"""Dropout, which DINOv2's layers have arguments for and nobody trains DINOv2 with."""

from __future__ import annotations


def check_no_dropout(name: str, **ratios: float) -> None:
    """Refuse dropout.

    Args:
        name: layer for the error message.
        **ratios: share that each argument of the layer would drop.
    Raises:
        ValueError: a share other than 0.
    """
    for argument, ratio in ratios.items():
        if ratio != 0:
            raise ValueError(
                f"{name}: expected {argument} 0, got {ratio}; use drop_path of the block to "
                "regularise"
            )
