"""Launch PTX on a real GPU through the CUDA driver, with the arguments of simt.launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tools.simt.memory import Output, as_bytes

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def _check(driver: ctypes.CDLL, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'?').decode()}")


def launch_on_gpu(
    ptx: str,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
) -> None:
    """Run a kernel; arrays hold what it wrote. Integers travel as their NumPy type or 32 bits."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the primary context, current in this thread
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver, driver.cuModuleLoadData(ctypes.byref(module), ptx.encode()))
    name = kernel.encode()
    _check(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, name))
    _check(
        driver, driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, max(shared_bytes, 0))
    )
    copies, values = [], []
    for arg in args:
        array = arg.array if isinstance(arg, Output) else arg
        if isinstance(array, np.ndarray):
            there = torch.from_numpy(as_bytes(array).copy()).cuda()
            copies.append((array, there))
            values.append(ctypes.c_uint64(there.data_ptr()))
        elif isinstance(array, np.uint64):
            values.append(ctypes.c_uint64(int(array)))
        else:
            values.append(ctypes.c_int32(int(array)))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    sizes = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3]]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    _check(driver, driver.cuLaunchKernel(function, *sizes, shared_bytes, stream, pointers, None))
    torch.cuda.synchronize()
    for array, there in copies:
        as_bytes(array)[:] = there.cpu().numpy()
    driver.cuModuleUnload(module)
