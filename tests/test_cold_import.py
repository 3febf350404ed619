"""What `import dinov2_fast` costs and touches, measured in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_SECONDS_OVER_TORCH = 1.5

# What a person who only wants a layer should not pay for.
HEAVY = ["torchvision", "PIL", "matplotlib", "triton", "skimage", "rich", "tyro", "timm"]

NO_NETWORK = """
import socket
def refuse(*arguments):
    raise AssertionError(f"tried to connect to {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""

MODULES = [
    "dinov2_fast",
    "dinov2_fast.config",
    "dinov2_fast.losses",
    "dinov2_fast.models",
    "dinov2_fast.cli",
]


def run(code: str) -> str:
    """What a fresh interpreter prints; it fails with the interpreter's own message."""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def costs() -> dict[str, tuple[float, list[str]]]:
    """Module -> processor seconds that importing it and all before it costs, heavy imports."""
    code = f"""{NO_NETWORK}
import importlib, sys, time
import torch
loaded = set(sys.modules)
begin = time.process_time()
for module in {MODULES}:
    importlib.import_module(module)
    if module == "dinov2_fast":
        sys.modules[module].Pack, sys.modules[module].use_backend
    heavy = [name for name in {HEAVY} if name in set(sys.modules) - loaded]
    print(module, time.process_time() - begin, *heavy)
"""
    rows = [line.split() for line in run(code).splitlines()]
    return {module: (float(seconds), heavy) for module, seconds, *heavy in rows}


@pytest.mark.parametrize("module", MODULES)
def test_importing_costs_little_over_torch(module: str, costs: dict):
    seconds, heavy = costs[module]
    assert seconds <= MAX_SECONDS_OVER_TORCH
    assert heavy == []


def test_importing_alone_does_not_import_torch():
    # Lazy submodules: `--version` and shell completion answer before torch is read.
    assert run("import dinov2_fast, sys; print('torch' in sys.modules)").strip() == "False"


def test_the_check_for_connections_sees_one():
    code = f"{NO_NETWORK}\nsocket.create_connection(('127.0.0.1', 9))"
    with pytest.raises(AssertionError, match="tried to connect"):
        run(code)
