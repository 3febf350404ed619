"""What the extension's CUDA functions refuse, argument by argument, before anything is launched."""

from __future__ import annotations

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


def launches(name: str, **arguments: Any) -> int:
    """How many kernels a function would launch."""
    native.module().record_launches_cuda(True)
    try:
        getattr(native.module(), name)(**arguments, device=0, stream=0)
        return len(native.module().take_launches_cuda())
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
            with pytest.raises(ValueError, match=f"{key}: expected a row stride of at least"):
                launches(name, **(good | {f"{key}_row_stride": 1}))
