"""Products by libraries that benchmarks compare are products, on one thread."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import libraries
from benchmarks.libraries import LIBRARIES, product_by, why_no_library
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget


# Strides as in a linear layer's three products; 257 and 33 end in a ragged tile of any library.
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_multiplies_matrices(library, transposed):
    if reason := why_no_library(library):
        pytest.skip(reason)
    left, right = randn(257, 64), randn(64, 33, seed=1)
    if transposed[0]:
        left = left.t().contiguous().t()
    if transposed[1]:
        right = right.t().contiguous().t()
    found = product_by(library, left, right)()
    assert_within_error_budget(
        found,
        low_precision=torch.mm(left, right),
        truth=torch.mm(left.double(), right.double()),
        name=library,
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_computes_on_the_thread_whose_time_is_taken(library):
    if reason := why_no_library(library):
        pytest.skip(reason)
    multiply = product_by(library, randn(512, 512), randn(512, 512, seed=1))
    multiply()
    thread, process = time.thread_time(), time.process_time()
    for _ in range(20):  # 5 GFLOP: long enough for other threads to show
        multiply()
    own, all_threads = time.thread_time() - thread, time.process_time() - process
    assert own > 0.9 * all_threads


def test_a_system_without_proc_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "_MAPS", tmp_path / "maps")
    assert "only Linux has" in why_no_library("OpenBLAS")
    assert "Linux" not in why_no_library("oneDNN")
