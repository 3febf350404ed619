from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dinov2_fast import flash_attention
from dinov2_fast.errors import BackendUnavailable
from tests import flash_attn_stand_in as stand_in
from tests.flash_attn_stand_in import flash_attn_on_cpu


@pytest.mark.parametrize(
    ("releases", "capability", "generation"),
    [
        (("2.8.3",), 8, 2),
        (("2.8.3",), 9, 2),
        (("3.0.0",), 9, 3),
        (("2.8.3", "3.0.0"), 9, 3),
        (("2.8.3", "3.0.0"), 8, 2),
        (("2.8.3", "3.0.0"), 10, 2),
        (("2.6.3", "3.0.0"), 9, 3),
    ],
)
def test_the_newest_that_the_gpu_runs_is_taken(
    releases: tuple[str, ...], capability: int, generation: int
):
    with flash_attn_on_cpu(*releases, capability=capability):
        assert flash_attention.why_not() == ""
        assert flash_attention.installed().generation == generation


@pytest.mark.parametrize(
    ("releases", "capability", "reason"),
    [
        ((), 9, r"no flash-attn is installed \(flash-attn-3 or flash-attn\)"),
        (("3.0.0",), None, "torch sees no CUDA device"),
        (("3.0.0",), 8, "flash-attn-3 has no code for compute capability 8"),
        (("2.8.3",), 7, "flash-attn has no code for compute capability 7"),
        (
            ("3.0.0", "2.6.3"),
            8,
            "capability 8; flash-attn 2.6.3 is not one that is known: "
            "_flash_attn_varlen_forward: no parameter window_size_left",
        ),
    ],
)
def test_it_says_why_there_is_none(releases: tuple[str, ...], capability: int | None, reason: str):
    with (
        flash_attn_on_cpu(*releases, capability=capability),
        pytest.raises(BackendUnavailable, match=f"expected an installed flash-attn, .*{reason}"),
    ):
        flash_attention.installed()


def test_a_release_with_other_parameters_is_refused_by_them(monkeypatch: pytest.MonkeyPatch):
    def forward(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, sink: Any) -> None:
        raise AssertionError("called")

    with flash_attn_on_cpu("3.0.0"):
        module = sys.modules["flash_attn_interface"]
        monkeypatch.setattr(module, "_flash_attn_forward", forward)
        expected = (
            "flash-attn-3 3.0.0 is not one that is known: _flash_attn_forward: no parameter "
            "max_seqlen_q, no parameter max_seqlen_k, no parameter softmax_scale, "
            "unknown parameter sink without a default"
        )
        assert flash_attention.why_not() == expected
        flash_attention._load.cache_clear()
        monkeypatch.delattr(module, "_flash_attn_forward")
        assert flash_attention.why_not().endswith("_flash_attn_forward: no such function")


def test_what_fails_to_import_is_a_reason_and_not_tried_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(flash_attention, "_capability", mock.Mock(side_effect=[None, 9]))
    found = [flash_attention._load.__wrapped__()[1] for _ in range(2)]
    assert found == ["torch sees no CUDA device", "flash-attn failed to import: undefined symbol"]


def test_every_release_is_called_with_what_asks_for_nothing():
    # Whatever a release adds with a default stays at it; whatever it wants is on the list.
    for release in stand_in.SERVED:
        with flash_attn_on_cpu(release):
            package = flash_attention.installed()
        for function in (package.forward, package.backward):
            assert function.keywords["softcap"] == 0.0
            assert not any(function.keywords.get(name) for name in ("causal", "is_causal"))
