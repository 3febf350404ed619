"""Calls that reach a kernel of the CPU without torch's dispatcher, and who makes them take it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops import _declare
from dinov2_fast.ops.attention import attention
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.gelu import gelu
from dinov2_fast.ops.koleo import koleo
from dinov2_fast.ops.layer_norm import layer_norm
from dinov2_fast.ops.stochastic_depth import gather_rows, scatter_add_scaled
from dinov2_fast.ops.swiglu import swiglu
from dinov2_fast.packing import Pack
from tests.inputs import leaves, randn

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=f"native: {native.why_not()}")
PACK = Pack.from_groups([(2, 5), (1, 3)])  # more than one run, more than a vector of tokens
ROWS = torch.tensor([0, 3])


def calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Name of an op -> a differentiable call, and the tensors it takes."""
    x = randn(4, 8)
    return {
        "attention": (
            lambda q, k, v: attention(q, k, v, PACK, backend="native"),
            [randn(13, 2, 16, seed=seed) for seed in range(3)],
        ),
        "cross_entropy": (
            lambda x: cross_entropy(
                x,
                randn(4, 8, seed=1),
                torch.zeros(8),
                torch.zeros(4),
                student_temperature=0.1,
                teacher_rows=torch.arange(4),
                teacher_temperature=0.07,
                backend="native",
            ),
            [x],
        ),
        "gelu": (lambda x: gelu(x, backend="native"), [x]),
        "koleo": (lambda x: koleo(x, backend="native"), [x]),
        "layer_norm": (
            lambda x, weight, bias: layer_norm(x, weight, bias, eps=1e-6, backend="native"),
            [x, randn(8, seed=1), randn(8, seed=2)],
        ),
        "gather_rows": (lambda x: gather_rows(x, ROWS, backend="native"), [x]),
        "scatter_add_scaled": (
            lambda x, y, gamma: scatter_add_scaled(
                x, y, ROWS, torch.ones(2), gamma, backend="native"
            ),
            [x, randn(2, 8, seed=1), randn(8, seed=2)],
        ),
        "swiglu": (lambda x: swiglu(x, backend="native"), [x]),
    }


NAMES = list(calls())


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    copies = leaves(*inputs)
    out = function(*copies)
    return [out.detach(), *torch.autograd.grad(out, copies, randn(*out.shape, seed=9))]


def ops_of(function: Callable[[], object]) -> set[str]:
    """Ops of this package that a mode under torch's dispatcher sees."""
    seen: set[str] = set()

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace == "dinov2_fast":
                seen.add(func.name().removeprefix("dinov2_fast::"))
            return func(*args, **(kwargs or {}))

    with Watcher():
        function()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_results_are_bit_equal_with_and_without_the_dispatcher(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    function, inputs = calls()[name]
    asked: list[bool] = []
    watches = _declare.nothing_watches
    monkeypatch.setattr(
        _declare, "nothing_watches", lambda args: asked.append(watches(args)) or asked[-1]
    )
    direct = [function(*inputs), *with_gradients(function, inputs)]
    assert len(asked) >= 2
    assert all(asked)
    monkeypatch.setattr(_declare, "nothing_watches", lambda args: False)
    dispatched = [function(*inputs), *with_gradients(function, inputs)]
    assert all(map(torch.equal, direct, dispatched))


@pytest.mark.parametrize("name", NAMES)
def test_a_mode_sees_the_op_and_its_gradient(name: str):
    function, inputs = calls()[name]
    assert ops_of(lambda: function(*inputs)) == {name}
    backward = set() if name == "gather_rows" else {f"{name}_backward"}  # whose gradient adds rows
    assert ops_of(lambda: with_gradients(function, inputs)) == {name} | backward


def test_a_mode_of_functions_sees_the_op():
    seen: list[str] = []

    class Watcher(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watcher():
        gelu(randn(4, 8), backend="native")
    assert "dinov2_fast.gelu.default" in seen


def test_a_profiler_sees_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gelu(randn(4, 8), backend="native")
    assert "dinov2_fast::gelu" in {event.key for event in profile.key_averages()}


def test_tracers_record_the_op():
    x = randn(4, 8)
    recorded = make_fx(lambda x: gelu(x, backend="native"))(x)
    assert torch.ops.dinov2_fast.gelu.default in {node.target for node in recorded.graph.nodes}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torchscript_records_the_op():
    traced = torch.jit.trace(lambda x: gelu(x, backend="native"), randn(4, 8), check_trace=False)
    assert "dinov2_fast::gelu" in str(traced.graph)


def test_a_subclass_of_tensors_is_given_to_the_dispatcher():
    x, y = randn(4, 8), randn(4, 8, seed=1)
    out = gelu(TwoTensor(x, y), backend="native")
    assert isinstance(out, TwoTensor)
    assert torch.equal(out.b, gelu(y, backend="native"))


def test_transforms_are_given_to_the_dispatcher():
    x = randn(3, 4, 8)
    mapped = torch.func.vmap(lambda x: gelu(x, backend="native"))(x)
    assert torch.equal(mapped, torch.stack([gelu(each, backend="native") for each in x]))


def test_parameters_are_plain_tensors():
    x = torch.nn.Parameter(randn(4, 8))
    assert _declare.nothing_watches((x, None))
    assert not _declare.nothing_watches((x.to("meta"),))


def test_what_other_threads_do_is_not_watching():
    answers: list[bool] = []
    with ops_in_a_mode():
        thread = threading.Thread(
            target=lambda: answers.append(_declare.nothing_watches((randn(2, 2),)))
        )
        thread.start()
        thread.join()
    assert answers == [True]


def ops_in_a_mode() -> TorchDispatchMode:
    """A mode that changes nothing."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    return Nothing()


def test_a_second_derivative_is_refused():
    (x,) = leaves(randn(4, 8))
    (dx,) = torch.autograd.grad(gelu(x, backend="native").sum(), x, create_graph=True)
    with pytest.raises(BackendUnavailable, match="gelu_backward: expected no further derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_for_a_backward_pass_that_cannot_come(name: str):
    function, inputs = calls()[name]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert not function(*inputs).requires_grad
        with torch.no_grad():
            assert not function(*leaves(*inputs)).requires_grad
    assert not kept


def test_attention_makes_no_gradient_of_the_logarithms():
    q, k, v = leaves(*(randn(13, 2, 16, seed=seed) for seed in range(3)))
    out = attention(q, k, v, PACK, backend="native")
    made: list[str] = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watcher():
        out.backward(torch.ones_like(out))
    assert not [name for name in made if "zeros" in name]
