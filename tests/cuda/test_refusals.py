"""What the extension's CUDA functions refuse, argument by argument, before anything is launched."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dinov2_fast import backends, native
from dinov2_fast.ops import _native_cuda
from tools.kernel_report.__main__ import CASES
from tools.kernel_report.cases import as_it_is

pytestmark = pytest.mark.skipif(not native.cuda_archs(), reason="no extension with CUDA")

# Arguments that may be null, with what a null pointer means.
OPTIONAL = {
    "gelu_backward_cuda": {"activation"},  # it is not wanted
    "layer_norm_forward_cuda": {"rows"},  # all
    "layer_norm_backward_cuda": {"bias", "dx_rows"},  # y is no source; all
    "stochastic_depth_scatter_cuda": {"rows", "row_scale", "gamma"},  # all; ones; ones
    "stochastic_depth_gather_cuda": {"rows", "row_scale"},  # all; ones
    "swiglu_backward_cuda": {"h"},  # it is not wanted
}
# Arguments that are for the CPU, or say nothing where their matrix is null.
IGNORED = {
    "layer_norm_forward_cuda": {"op", "num_x_rows"},
    "stochastic_depth_gather_cuda": {"residual_row_stride"},
}
# Matrices that are written, with rows of any distance.
WRITTEN = {
    "cross_entropy_backward_cuda": ("grad",),
    "gelu_forward_cuda": ("a",),
    "gelu_backward_cuda": ("dx", "activation"),
    "layer_norm_forward_cuda": ("y",),
    "layer_norm_backward_cuda": ("dx",),
    "stochastic_depth_scatter_cuda": ("x",),
    "stochastic_depth_gather_cuda": ("g",),
    "swiglu_forward_cuda": ("h",),
    "swiglu_backward_cuda": ("dx12", "h"),
}
# The most CTAs of a grid, along x and along y, and how much of an argument fills them: a CTA has a
# few rows, or 32 columns where they are no whole vectors.
ALONG_X, ALONG_Y = 2**31 - 1, 65535
FILLS_A_GRID = {
    "cross_entropy_forward_cuda": {"rows": ALONG_X, "num_splits": ALONG_Y},
    "cross_entropy_backward_cuda": {"rows": ALONG_X, "prototypes": 2048 * ALONG_Y},
    "gelu_forward_cuda": {"width": 32 * ALONG_X},
    "gelu_backward_cuda": {"width": 32 * ALONG_X, "num_partials": ALONG_Y},
    "koleo_forward_cuda": {"num_splits": ALONG_Y},
    "koleo_backward_cuda": {},
    "layer_norm_forward_cuda": {"num_rows": 4 * ALONG_X},
    "layer_norm_backward_cuda": {"num_partials": ALONG_X},
    "optimizer_norm_cuda": {"num_chunks": ALONG_X},
    "optimizer_step_cuda": {"num_chunks": ALONG_X},
    "optimizer_table_cuda": {},
    "sinkhorn_columns_cuda": {"columns": 32 * ALONG_X, "num_partials": ALONG_Y},
    "sinkhorn_rows_cuda": {"rows": 4 * ALONG_X, "num_splits": ALONG_Y},
    "stochastic_depth_gather_cuda": {"channels": 32 * ALONG_X, "num_partials": ALONG_Y},
    "stochastic_depth_scatter_cuda": {"channels": 32 * ALONG_X},
    "swiglu_forward_cuda": {"hidden": 32 * ALONG_X},
    "swiglu_backward_cuda": {"hidden": 32 * ALONG_X, "num_partials": ALONG_Y},
}
# What kernels count in 32 bits: rows, which the last tile rounds up; steps of 64 channels for each
# tile of 16 rows, of 32 for 64 rows from 513 rows on; numbers of two tensors, which they add.
COUNTED = [
    ("koleo_forward_cuda", "rows", 2**31 - 65, {}),
    ("koleo_backward_cuda", "rows", 2**31 - 65, {}),
    ("koleo_forward_cuda", "channels", 64 * (2**31 - 1), {"rows": 16, "num_splits": 1}),
    ("koleo_forward_cuda", "channels", 64 * ((2**31 - 1) // 3), {"rows": 90, "num_splits": 2}),
    ("koleo_forward_cuda", "channels", 32 * ((2**31 - 1) // 9), {"rows": 513, "num_splits": 1}),
    ("optimizer_norm_cuda", "num_tensors", 2**30, {}),
    ("optimizer_step_cuda", "num_tensors", 2**30, {}),
    ("attention_forward_cuda", "num_heads", 2**31 - 1, {"launches": (0, 1, 1, 1, 0)}),
    ("attention_backward_cuda", "num_heads", 2**31 - 1, {"launches": (0, 1, 1, 1, 0)}),
]
# Sizes that may be 0: nothing is launched, or kernels that write what no numbers come to. A null
# pointer for a list of rows says that all are meant.
EMPTY = {"rows", "num_rows", "width", "hidden", "channels", "columns", "prototypes", "num_chunks"}
EMPTY |= {"num_heads"}
REFUSED_EMPTY = {f"layer_norm_{way}_cuda": {"channels"} for way in ("forward", "backward")}
COUNTED_STEMS = ["koleo", "optimizer", "attention"]
ROW_STEMS = [stem for stem in CASES if any(name.startswith(f"{stem}_") for name in WRITTEN)]
Call = tuple[str, dict[str, Any], set[str]]


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Functions that an op calls: name, arguments that they take, and which are tensors."""
    found: dict[str, Call] = {}
    tensors_alive: list[Any] = []

    def call(name: str, plain: Any, tensors: Any, reached: Any) -> None:
        del reached
        tensors_alive.append(tensors)
        found.setdefault(name, (name, dict(plain), set(tensors)))

    monkeypatch.setattr(_native_cuda, "call", call)
    monkeypatch.setattr(native, "cuda_on_cpu", True)
    backends._why_not.cache_clear()
    case = min(CASES[request.param], key=lambda case: case.sizes)
    list(case.run(case.sizes, case.types, as_it_is, "native"))
    monkeypatch.undo()
    backends._why_not.cache_clear()
    return list(found.values())


def launches(name: str, **arguments: Any) -> list[list[int]]:
    """Grids of the kernels that a function would launch."""
    native.module().record_launches_cuda(True)
    try:
        getattr(native.module(), name)(**arguments, device=0, stream=0)
        return [grid for _, grid, *_ in native.module().take_launches_cuda()]
    finally:
        native.module().record_launches_cuda(False)


@pytest.mark.parametrize("calls", CASES, indirect=True)
def test_every_argument_is_checked(calls: list[Call]):
    for name, good, tensors in calls:
        assert launches(name, **good)
        for key, value in good.items():
            if key in OPTIONAL.get(name, set()) | IGNORED.get(name, set()):
                continue
            if key in tensors:
                wrong, why = 0, "(must not be a null pointer|if and only if)"
            elif isinstance(value, str):
                wrong, why = "float64", "(expected|must be) .*got .*float64"
            elif type(value) is int and value > 0:
                wrong, why = -1, "-1|if and only if|must have its heads at multiples of 16"
            else:
                continue
            with pytest.raises(ValueError, match=why) as refused:
                launches(name, **(good | {key: wrong}))
            assert str(refused.value).startswith(f"{name}: "), key


@pytest.mark.parametrize("calls", ROW_STEMS, indirect=True)
def test_rows_that_would_overlap_are_not_written(calls: list[Call]):
    for name, good, _ in calls:
        for key in WRITTEN.get(name, ()):
            close = good | {f"{key}_row_stride": 1}
            with pytest.raises(ValueError, match=f"{key}: expected a row stride of at least"):
                launches(name, **close)
            # One row has no other to overlap; torch gives it any stride.
            assert launches(name, **(close | {"num_rows" if "num_rows" in good else "rows": 1}))


def assert_is_the_most(name: str, good: dict[str, Any], key: str, most: int) -> list[list[int]]:
    """Grids of a call with so much of an argument; with one more it is refused."""
    grids = launches(name, **(good | {key: most}))
    message = f"{name}: {key} must be at most {most}, got {most + 1}; use backend='reference'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        launches(name, **(good | {key: most + 1}))
    return grids


@pytest.mark.parametrize("calls", [stem for stem in CASES if stem != "attention"], indirect=True)
def test_no_grid_is_cut_short(calls: list[Call]):
    word = calls[0][0].partition("_")[0]
    assert {name for name, *_ in calls} == {name for name in FILLS_A_GRID if name.startswith(word)}
    for name, good, _ in calls:
        for key, most in FILLS_A_GRID[name].items():
            changes = {stride: 2**40 + 1 for stride in good if stride.endswith("row_stride")}
            if key in ("num_splits", "num_partials") and "partials" in good:
                changes["partials"] = 16
            grids = assert_is_the_most(name, good | changes, key, most)
            assert any(x == ALONG_X or y == ALONG_Y for x, y, _ in grids), (name, key)


@pytest.mark.parametrize("calls", [stem for stem in CASES if stem != "koleo"], indirect=True)
def test_no_grid_is_of_no_ctas(calls: list[Call]):
    for name, good, _ in calls:
        for key in EMPTY & good.keys() - REFUSED_EMPTY.get(name, set()):
            assert all(all(grid) for grid in launches(name, **(good | {key: 0}))), (name, key)


@pytest.mark.parametrize("calls", COUNTED_STEMS, indirect=True)
def test_nothing_that_is_counted_in_32_bits_is_past_them(calls: list[Call]):
    for name, good, _ in calls:
        for function, key, most, changes in COUNTED:
            if function == name:
                assert assert_is_the_most(name, good | changes, key, most)
