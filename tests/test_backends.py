from __future__ import annotations

import importlib.util
import logging
import sys

import pytest
import torch

from dinov2_fast import backends, doctor, environment, native
from dinov2_fast.backends import availability, choose_backend, use_backend
from dinov2_fast.errors import BackendUnavailable, ConfigError
from dinov2_fast.ops._attention_kernels import choose as choose_attention
from dinov2_fast.packing import Pack

OPS = sorted(backends.PREFERENCE)
X = torch.zeros(2, 4)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch):
    """A process in which the extension is not built."""
    monkeypatch.setattr(native, "_load", lambda: (None, "the extension is not built"))
    backends._why_not.cache_clear()
    backends._log_fallback.cache_clear()
    yield
    monkeypatch.undo()
    backends._why_not.cache_clear()


@pytest.fixture
def with_extension() -> None:
    if native.why_not():
        pytest.skip(f"native: {native.why_not()}")


@pytest.fixture(autouse=True)
def no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOV2_FAST_BACKEND", raising=False)
    monkeypatch.delenv("DINOV2_FAST_DISABLE_KERNELS", raising=False)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_reference_on_every_device_type(op: str):
    for device_type in ("cpu", "cuda", "mps", "meta"):
        assert availability(op, device_type)["reference"] == ""
        assert "reference" in backends.PREFERENCE[op].get(device_type, ("reference",))
    assert choose_backend(op, torch.empty(2, device="meta"), None) == "reference"


def test_the_table_names_only_backends_and_ops_that_state_their_types():
    for op, devices in backends.PREFERENCE.items():
        for device_type, order in devices.items():
            assert set(order) <= set(backends.BACKENDS)
            assert len(set(order)) == len(order)
            for name in set(order) - {"reference"}:
                assert backends.DTYPES[op, name, device_type]


def test_the_environment_takes_every_backend():
    for variable in (environment.BACKEND, environment.PREFER):
        assert variable.choices == ("auto", *backends.BACKENDS)


def test_argument_beats_context_beats_environment_beats_table(
    with_extension: None, monkeypatch: pytest.MonkeyPatch
):
    assert choose_backend("swiglu", X, None) == "native"
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "reference")
    assert choose_backend("swiglu", X, None) == "reference"
    with use_backend("native"):
        assert choose_backend("swiglu", X, None) == "native"
        assert choose_backend("swiglu", X, "reference") == "reference"
        with use_backend(None):
            assert choose_backend("swiglu", X, None) == "reference"
        assert choose_backend("swiglu", X, None) == "native"
    assert choose_backend("swiglu", X, None) == "reference"


def test_the_context_ends_with_an_exception():
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert backends._forced is None


def test_explicit_choice_never_falls_back(without_extension: None, monkeypatch: pytest.MonkeyPatch):
    message = "swiglu: backend 'native' .* the extension is not built; available: reference"
    with pytest.raises(BackendUnavailable, match=message):
        choose_backend("swiglu", X, "native")
    with use_backend("native"), pytest.raises(BackendUnavailable, match=message):
        choose_backend("swiglu", X, None)
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "native")
    with pytest.raises(BackendUnavailable, match=message):
        choose_backend("swiglu", X, None)


def test_automatic_choice_falls_back_and_says_so_once(
    without_extension: None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="dinov2_fast"):
        assert choose_backend("swiglu", X, None) == "reference"
        assert choose_backend("swiglu", X, None) == "reference"
    expected = "swiglu: backend 'native' not used on cpu: the extension is not built"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_a_call_can_refuse_a_backend_with_its_reason(with_extension: None):
    why = {"native": "head dimension must be a multiple of 8, got 60"}
    assert choose_backend("swiglu", X, None, refusals=why) == "reference"
    with pytest.raises(BackendUnavailable, match="multiple of 8, got 60; available: reference"):
        choose_backend("swiglu", X, "native", refusals=why)


def test_reasons_are_asked_for_only_of_backends_in_question(with_extension: None):
    asked: list[str] = []

    def why_not(name: str) -> str:
        asked.append(name)
        return "rows must be adjacent" if name == "native" else ""

    assert choose_backend("swiglu", X, "reference", refusals=why_not) == "reference"
    assert asked == []
    assert choose_backend("swiglu", X, None, refusals=why_not) == "reference"
    assert asked == ["native"]
    with pytest.raises(BackendUnavailable, match="rows must be adjacent; available: reference"):
        choose_backend("swiglu", X, "native", refusals=why_not)


def test_an_environment_without_a_dictionary_behind_it_is_read_too(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("os.environ", {"DINOV2_FAST_BACKEND": "reference"})
    assert environment.backend() == "reference"
    assert environment.preferred_backend() is None


def test_float_types_a_kernel_lacks_are_refused_by_name(with_extension: None):
    assert choose_backend("swiglu", X.double(), None) == "reference"
    with pytest.raises(BackendUnavailable, match="takes float32, bfloat16, got float64"):
        choose_backend("swiglu", X.double(), "native")


def test_disabled_kernels_go_to_the_reference_unless_asked_for(
    with_extension: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DINOV2_FAST_DISABLE_KERNELS", "attention, swiglu")
    assert choose_backend("swiglu", X, None) == "reference"
    assert choose_backend("swiglu", X, "native") == "native"


def test_a_preferred_backend_is_tried_first_where_an_op_has_it(
    with_extension: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DINOV2_FAST_PREFER", "reference")
    assert choose_backend("swiglu", X, None) == "reference"
    assert choose_backend("swiglu", X, "native") == "native"
    monkeypatch.setenv("DINOV2_FAST_PREFER", "triton")  # which the CPU has for no op
    assert choose_backend("swiglu", X, None) == "native"
    assert choose_backend("koleo", X, None) == "native"


def empty_on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What choosing looks at of a tensor on a GPU; there is no memory behind it."""
    device = torch.device("cuda", 0)
    return torch.Tensor._make_wrapper_subclass(OnGpu, shape, dtype=dtype, device=device)


class OnGpu(torch.Tensor):
    """A tensor that nothing may compute on."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"choosing must not compute {func}")


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """A process that sees an A100, for choosing alone."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    backends._why_not.cache_clear()
    backends._log_fallback.cache_clear()
    yield
    monkeypatch.undo()
    backends._why_not.cache_clear()


def test_preferred_native_kernels_that_are_missing_leave_it_to_triton(
    with_a_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(native, "cuda_archs", lambda: ())  # no nvcc when it was installed
    x = empty_on_gpu(2, 4)
    assert {choose_backend(op, x, None) for op in OPS} == {"reference"}  # as the table says
    monkeypatch.setenv("DINOV2_FAST_PREFER", "native")
    with caplog.at_level(logging.INFO, logger="dinov2_fast"):
        assert {choose_backend(op, x, None) for op in OPS} == {"triton"}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(OPS)
    assert all("'native' not used on cuda: the extension was built without" in s for s in said)
    assert {doctor._first_choice(op, "cuda") for op in OPS} == {"triton"}
    with pytest.raises(BackendUnavailable, match=r"built without CUDA.*; available: .*triton"):
        choose_backend("swiglu", x, "native")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "chosen"),
    [
        (64, torch.bfloat16, "native"),
        (80, torch.bfloat16, "triton"),  # ViT-H
        (72, torch.float16, "triton"),  # so400m
        (64, torch.float32, "triton"),
        (144, torch.bfloat16, "reference"),  # past what Triton's keep in registers
    ],
)
def test_attention_of_heads_that_native_lacks_is_tritons(
    head_dim: int,
    dtype: torch.dtype,
    chosen: str,
    with_extension: None,
    with_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    if not native.cuda_archs():
        pytest.skip("the extension was built without CUDA")
    monkeypatch.setenv("DINOV2_FAST_PREFER", "native")
    monkeypatch.setattr(backends.flash_attention, "why_not", lambda: "it is not installed")
    q, pack = empty_on_gpu(5, 2, head_dim, dtype=dtype), Pack.from_lengths([5])
    with caplog.at_level(logging.INFO, logger="dinov2_fast"):
        assert choose_attention(None, pack, pack, scale=1.0, q=q, k=q, v=q) == chosen
    assert bool(caplog.records) == (chosen != "native")  # never silently


def test_an_order_begins_at_the_preferred_backend(monkeypatch: pytest.MonkeyPatch):
    order = backends.PREFERENCE["attention"]["cuda"]
    assert backends.order_of("attention", "cuda") == order
    for at, name in enumerate(order):
        monkeypatch.setenv("DINOV2_FAST_PREFER", name)
        assert backends.order_of("attention", "cuda") == order[at:] + order[:at]
        first = backends.order_of("attention", "cuda", "flash_attn")
        assert list(dict.fromkeys([name, "flash_attn"])) == list(first[: len({name, "flash_attn"})])
        assert set(first) == set(order)
    assert backends.order_of("attention", "mps") == ("reference",)


def test_without_the_triton_package_it_is_refused_by_name_and_passed_over(
    with_a_gpu: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.setattr(native, "cuda_archs", lambda: ())
    x = empty_on_gpu(2, 4)
    for op in OPS:
        why = f"{op}: backend 'triton' .* the triton package is not installed; available: reference"
        with pytest.raises(BackendUnavailable, match=why):
            choose_backend(op, x, "triton")
        for preferred in ("native", "triton"):
            monkeypatch.setenv("DINOV2_FAST_PREFER", preferred)
            assert choose_backend(op, x, None) == "reference"


def test_misspelt_names_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ValueError, match="one of reference, native, triton, flash_attn or None, got 'nativ'"
    ):
        choose_backend("swiglu", X, "nativ")
    with pytest.raises(ValueError, match="use_backend: backend must be"), use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match=r"expected an op of .*swiglu.*, got 'swigloo'"):
        availability("swigloo", "cpu")
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "fast")
    with pytest.raises(ConfigError, match=r"DINOV2_FAST_BACKEND: expected one of auto, .* 'fast'"):
        choose_backend("swiglu", X, None)


def test_compiled_code_is_traced_again_for_another_backend(with_extension: None):
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if choose_backend("swiglu", x, None) == "reference" else 2)

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(X)[0, 0] == 2
    with use_backend("reference"):
        assert compiled(X)[0, 0] == 1
    assert compiled(X)[0, 0] == 2


@pytest.mark.parametrize(
    ("arch", "runs"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)]),  # machine code runs on later minor versions only
        ("90-real", [(9, 0)]),
        ("90-virtual", [(9, 0), (10, 0), (12, 0)]),  # PTX runs on anything later
        ("90a", [(9, 0)]),  # code for one chip
        ("75", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    ],
)
def test_which_gpu_runs_which_code(arch: str, runs: list[tuple[int, int]]):
    gpus = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [gpu for gpu in gpus if native.runs_on(arch, *gpu)] == runs


def test_the_environment_is_described_and_misspelt_variables_are_found(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("DINOV2_FAST_BACKEN", "native")
    monkeypatch.setenv("DINOV2_FAST_CPU_LEVEL", "")
    assert environment.unknown_variables() == ["DINOV2_FAST_BACKEN"]
    assert environment.cpu_level() == "auto"
    names = [row["name"] for row in environment.describe()]
    assert names == [variable.name for variable in environment.VARIABLES]
