"""FlashAttention-2 and -3, counted as our own kernels are, and our attention beside them.

Their kernels for packed sequences, head width 64, bfloat16, not causal, in the instances that
their own dispatch takes on A100 (FlashAttention-2) and H100, were compiled from their sources and
executed by an interpreter of PTX; a row holds what one sequence and head gives to each pipe. The
rows are carried over: no command here makes them again.
Instructions are those of PTX times the share that is left in the machine code of the main loops.
FlashAttention-3's forward has its tile of 192 x 192. The backward accumulates dQ in float32 by
atomic additions, which count as a read and a write, between a kernel that clears and one that
converts; its bytes count as if they left the L2, which is so from some hundred sequences on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.kernel_report.pipes import Work, bound
from tools.simt.report import Gpu

# Case -> lengths of the sequences, with one head.
CASES: dict[str, tuple[int, ...]] = {
    "50": (50,),
    "257": (257,),
    "mix": (257, 50, 50, 50, 50),  # the crops of DINOv2, one global for four local ones
    "1370": (1370,),
}
HEAD_DIM = 64
DIRECTIONS = ("forward", "backward", "forward + backward")
# Kernel -> GPUs that it runs on.
KERNELS = {"FlashAttention-2": ("A100", "H100"), "FlashAttention-3": ("H100",)}
_PRODUCTS = {"forward": 2, "backward": 5}  # of N x N x head width

# (kernel, direction, case) -> launches of (cycles in which a scheduler of four issues, MFLOP of the
# tensor cores, MUFU instructions, shared-memory passes with shuffles, kilobytes of HBM).
_COUNTED: dict[tuple[str, str, str], list[tuple[float, float, float, float, float]]] = {
    ("FlashAttention-2", "forward", "50"): [(1892, 4.194, 526, 1700, 25.8)],
    ("FlashAttention-2", "forward", "257"): [(12_575, 37.749, 4770, 13_700, 132.6)],
    ("FlashAttention-2", "forward", "mix"): [(20_525, 54.526, 6874, 20_540, 235.8)],
    ("FlashAttention-2", "forward", "1370"): [(147_725, 507.511, 64_050, 178_400, 707.0)],
    ("FlashAttention-2", "backward", "50"): [
        (752, 0, 0, 96, 46.1),
        (3939, 10.486, 512, 6690, 104.7),
        (826, 0, 0, 256, 39.2),
    ],
    ("FlashAttention-2", "backward", "257"): [
        (2342, 0, 0, 288, 165.6),
        (26_000, 94.372, 4608, 53_300, 396.6),
        (2516, 0, 0, 737, 131.2),
    ],
    ("FlashAttention-2", "backward", "mix"): [
        (5712, 0, 0, 672, 350.1),
        (45_900, 136.315, 6656, 80_100, 815.3),
        (6250, 0, 0, 1761, 287.9),
    ],
    ("FlashAttention-2", "backward", "1370"): [
        (8916, 0, 0, 1056, 716.9),
        (301_600, 1268.777, 61_950, 661_900, 1784.1),
        (9380, 0, 0, 2816, 535.9),
    ],
    ("FlashAttention-3", "forward", "50"): [(3785, 9.437, 1200, 3636, 25.8)],
    ("FlashAttention-3", "forward", "257"): [(11_700, 37.749, 4752, 13_100, 132.6)],
    ("FlashAttention-3", "forward", "mix"): [(26_800, 75.497, 9550, 27_700, 235.8)],
    ("FlashAttention-3", "forward", "1370"): [(139_300, 603.980, 75_450, 193_400, 706.9)],
    ("FlashAttention-3", "backward", "50"): [
        (847, 0, 0, 96, 46.8),
        (2642, 10.486, 512, 4260, 105.0),
        (555, 0, 0, 768, 39.2),
    ],
    ("FlashAttention-3", "backward", "257"): [
        (2651, 0, 0, 288, 168.2),
        (16_800, 94.372, 4608, 33_100, 397.1),
        (1710, 0, 0, 2273, 131.2),
    ],
    ("FlashAttention-3", "backward", "mix"): [
        (6575, 0, 0, 672, 355.5),
        (29_100, 136.315, 6656, 50_900, 817.0),
        (4506, 0, 0, 5345, 287.9),
    ],
    ("FlashAttention-3", "backward", "1370"): [
        (10_100, 0, 0, 1056, 728.1),
        (189_800, 1268.777, 61_950, 420_900, 1784.2),
        (6448, 0, 0, 8448, 535.9),
    ],
}


def _work(kernel: str, launch: tuple[float, float, float, float, float]) -> Work:
    issue, mflop, mufu, passes, kilobytes = launch
    wgmma = kernel == "FlashAttention-3"
    return Work(
        issued=4 * issue,
        mma_flops=0.0 if wgmma else mflop * 1e6,
        wgmma_flops=mflop * 1e6 if wgmma else 0.0,
        mufu=mufu,
        shared_passes=passes,
        hbm_bytes=kilobytes * 1e3,
    )


COUNTED: dict[tuple[str, str, str], tuple[Work, ...]] = {
    key: tuple(_work(key[0], launch) for launch in launches) for key, launches in _COUNTED.items()
}


def useful_flops(direction: str, case: str) -> float:
    """FLOPs of the products that the result needs, for one head.

    Args:
        direction: "forward", "backward", or both as "forward + backward".
        case: of `CASES`.
    """
    products = sum(_PRODUCTS[part] for part in direction.split(" + "))
    return sum(2 * products * n * n * HEAD_DIM for n in CASES[case])


def compare(ours: Mapping[tuple[str, str], Sequence[Work]], gpu: Gpu) -> list[dict[str, Any]]:
    """Our kernels beside theirs on one GPU, by modelled bounds.

    Args:
        ours: (direction, case) -> work of our launches for one head, compiled for that GPU.
        gpu: whose rates.
    Returns:
        Rows of gpu, direction, case, kernel, the bound in cycles of an SM, what binds, useful
        TFLOP/s at that bound, and for theirs `ratio`, their bound over ours: over 1, ours is
        shorter. Only cases that ours has.
    """
    rows: list[dict[str, Any]] = []
    for direction in DIRECTIONS:
        for case in CASES:
            parts = [(part, case) for part in direction.split(" + ")]
            if not all(ours.get(part) for part in parts):
                continue
            launches = {"ours": [work for part in parts for work in ours[part]]}
            for kernel, names in KERNELS.items():
                if gpu.name in names:
                    launches[kernel] = [w for part in parts for w in COUNTED[(kernel, *part)]]
            cycles = {kernel: bound(each, gpu) for kernel, each in launches.items()}
            for kernel, (total, binding) in cycles.items():
                seconds = total / gpu.clock_ghz / 1e9
                speed = useful_flops(direction, case) / seconds * gpu.num_sms / 1e12
                row = {"gpu": gpu.name, "direction": direction, "case": case, "kernel": kernel}
                row |= {"modelled_cycles": round(total), "binds": binding}
                row["useful_tflop_s_at_bound"] = round(speed, 1)
                if kernel != "ours":
                    row["ratio"] = round(total / cycles["ours"][0], 2)
                rows.append(row)
    return rows
