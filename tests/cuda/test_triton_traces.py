"""Ops with Triton's kernels under torch.compile with sizes that change, and in torch.export.

A graph that torch.compile makes holds the kernels' launches, an exported program the ops.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._subclasses import FakeTensorMode

import dinov2_fast.kernels
from dinov2_fast import backends, environment
from dinov2_fast.ops.attention import attention
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.gelu import gelu
from dinov2_fast.ops.koleo import koleo
from dinov2_fast.ops.layer_norm import layer_norm
from dinov2_fast.ops.sinkhorn import sinkhorn
from dinov2_fast.ops.stochastic_depth import gather_rows, scatter_add_scaled
from dinov2_fast.ops.swiglu import swiglu
from dinov2_fast.packing import Pack
from tests.inputs import randn
from tools.simt.triton_launch import triton_on_cpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets")

WIDTH = 24  # whole vectors, and no whole tile
ROWS = (3, 17, 64)  # fewer than a tile's, one past it, and more than PROGRAMS take at once
PROGRAMS = 3


def of_layer_norm(x: Tensor) -> Tensor:
    channels = x.shape[1]
    return layer_norm(x, x.new_ones(channels), x.new_zeros(channels), backend="triton")


def of_stochastic_depth(x: Tensor) -> Tensor:
    num_rows = x.shape[0] - 1
    rows, scale = torch.arange(num_rows, device=x.device), x.new_ones(num_rows)
    branch = gather_rows(x, rows, backend="triton")
    return scatter_add_scaled(x, branch * branch, rows, scale, x[0], backend="triton")


def of_sinkhorn(x: Tensor) -> Tensor:
    log_u, log_v = sinkhorn(x.detach(), temperature=0.1, backend="triton")
    return x + log_u + log_v.unsqueeze(1)


def of_cross_entropy(x: Tensor) -> Tensor:
    teacher, log_u, log_v = x.detach()[:2], x.new_zeros(x.shape[1]), x.new_zeros(2)
    rows = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.5}
    options = {"teacher_rows": rows, **temperatures, "backend": "triton"}
    return cross_entropy(x, teacher, log_u, log_v, **options)


def of_attention(x: Tensor) -> Tensor:
    q, k, v = x.view(-1, 3, 1, x.shape[1] // 3).unbind(1)
    return attention(q, k, v, Pack.from_lengths([5, 6], device=x.device), backend="triton")


# Op -> a function of a matrix of any number of rows, and the kernels of it and its gradient.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "swiglu": (lambda x: swiglu(x, backend="triton"), {"_forward_kernel", "_backward_kernel"}),
    "gelu": (lambda x: gelu(x, backend="triton"), {"_forward_kernel", "_backward_kernel"}),
    "koleo": (
        lambda x: koleo(x, backend="triton"),
        {"_normalise_kernel", "_nearest_kernel", "_distance_kernel", "_backward_kernel"},
    ),
    "layer_norm": (of_layer_norm, {"_forward_kernel", "_backward_kernel"}),
    "stochastic_depth": (of_stochastic_depth, {"_gather_kernel", "_scatter_kernel"}),
    "sinkhorn": (of_sinkhorn, {"_columns_kernel", "_rows_kernel"}),
    "cross_entropy": (of_cross_entropy, {"_forward_kernel", "_backward_kernel"}),
}


def each(names: Iterable[str], *, quick: set[str]) -> list:
    """The names, all but the quick ones slow."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


class Layer(nn.Module):
    """A function as torch.export wants it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.fixture(autouse=True)
def triton_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels made for a GPU run as PTX, and the ops believe that Triton interprets them."""
    for name in [found.name for found in pkgutil.iter_modules(dinov2_fast.kernels.__path__)]:
        module = importlib.import_module(f"dinov2_fast.kernels.{name}")
        if hasattr(module, "NUM_PROGRAMS"):
            monkeypatch.setattr(module, "NUM_PROGRAMS", PROGRAMS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends._why_not.cache_clear()
    with triton_on_cpu(80):
        yield
    backends._why_not.cache_clear()


def out_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]


def compiler_into(graphs: list[fx.GraphModule]) -> Callable[..., Callable]:
    """A compiler that keeps every graph, and runs it as it is."""

    def keep(graph: fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return keep


def compiled_into(graphs: list[fx.GraphModule], function: Callable) -> Callable:
    """The function compiled for any sizes; its graphs are kept, forward and backward."""
    keep = compiler_into(graphs)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def launches_in(graphs: list[fx.GraphModule]) -> list[fx.Node]:
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    return [node for node in nodes if node.target is triton_kernel_wrapper_functional]


def kernel_of(launch: fx.Node) -> str:
    kernel = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])
    return getattr(kernel, "fn", kernel).__name__


def written_by(launch: fx.Node) -> list[fx.Node]:
    """The tensors that a kernel writes to, as torch found in its code."""
    return [launch.kwargs["kwargs"][name] for name in launch.kwargs["tensors_to_clone"]]


def ops_of(program: nn.Module) -> set[str]:
    """The backends that ops of ours in a graph and the graphs inside it name."""
    graphs = [module.graph for module in program.modules() if isinstance(module, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    return {node.args[-1] for node in nodes if "dinov2_fast" in str(node.target)}


def device_type(node: fx.Node) -> str:
    value = node.meta.get("val")
    return value.device.type if isinstance(value, Tensor) else ""


@pytest.mark.parametrize("name", each(CASES, quick={"cross_entropy"}))
def test_one_compilation_serves_every_number_of_rows(name: str):
    function, kernels = CASES[name]
    graphs: list[fx.GraphModule] = []
    compiled = compiled_into(graphs, function)
    for rows in ROWS:
        x = randn(rows, WIDTH, seed=rows)
        found, expected = out_and_gradient(compiled, x), out_and_gradient(function, x)
        assert all(map(torch.equal, found, expected))
    assert len(graphs) == 2  # forward and backward, once
    launches = launches_in(graphs)
    assert {kernel_of(launch) for launch in launches} == kernels
    assert not any(ops_of(graph) for graph in graphs)
    # A kernel that seems to write to an input would have it copied first.
    assert not [n for launch in launches for n in written_by(launch) if n.op == "placeholder"]


@pytest.mark.parametrize("name", each(CASES, quick={"layer_norm"}))
def test_an_exported_program_holds_the_ops_for_every_number_of_rows(name: str):
    function, _ = CASES[name]
    shapes = ({0: torch.export.Dim("R", min=3)},)  # stochastic depth keeps all but one, and not 1
    program = torch.export.export(Layer(function), (randn(5, WIDTH),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file), program.run_decompositions()):
        assert ops_of(exported.graph_module) == {"triton"}
        layer = exported.module()
        for rows in ROWS:
            x = randn(rows, WIDTH, seed=rows)
            assert torch.equal(layer(x), function(x))


@pytest.mark.slow
def test_attention_is_compiled_and_exported_for_a_pack():
    x = randn(11, 48)
    graphs: list[fx.GraphModule] = []
    compiled = compiled_into(graphs, of_attention)
    found, expected = out_and_gradient(compiled, x), out_and_gradient(of_attention, x)
    assert all(map(torch.equal, found, expected))
    names = [kernel_of(launch) for launch in launches_in(graphs)]
    assert names == ["forward_kernel"] * 2 + ["backward_short_kernel"] * 2
    program = torch.export.export(Layer(of_attention), (x,))
    assert ops_of(program.graph_module) == {"triton"}
    assert torch.equal(program.module()(x), of_attention(x))


@pytest.mark.parametrize("name", each([*CASES, "attention"], quick={"gelu", "stochastic_depth"}))
def test_a_graph_for_a_gpu_never_leaves_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_why_not_triton", lambda op, interpreted: "")
    function = of_attention if name == "attention" else CASES[name][0]
    graphs: list[fx.GraphModule] = []
    with FakeTensorMode():  # without gradients: autograd would ask for the GPU
        x = torch.empty(11, WIDTH, device="cuda")
        aot_function(function, fw_compiler=compiler_into(graphs))(x)
    assert launches_in(graphs)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    on_gpu = {node for node in nodes if device_type(node) == "cuda"}
    assert not [n for n in nodes if device_type(n) == "cpu" and on_gpu & {*n.all_input_nodes}]
