"""Instructions that no larger program executes, and every layout of a wgmma operand."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tools import simt
from tools.simt.numbers import from_bf16, to_bf16

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def ptx() -> str:
    return simt.compile_cu(PROGRAMS / "instructions.cu", "compute_90a")


@pytest.mark.parametrize("schedule", ["lockstep", 1])
def test_barriers_reduce(ptx: str, schedule: str | int):
    x = np.where(np.arange(64) % 3, 1, -1).astype(np.int32)
    out = np.zeros((3, 64), np.int32)
    simt.launch(ptx, "barrier_red", 1, 64, [x, simt.Output(out)], schedule=schedule)
    assert (out == np.array([[(x > 0).sum()], [0], [1]])).all()


@pytest.mark.parametrize("schedule", ["lockstep", 1])
@pytest.mark.parametrize("noinc", [0, 1])
def test_cp_async_arrives_at_an_mbarrier(ptx: str, noinc: int, schedule: str | int):
    x = np.arange(512, dtype=np.float32).reshape(128, 4)
    out = np.empty_like(x)
    args = [x, simt.Output(out), noinc]
    simt.launch(ptx, "copy_arrival", 1, 128, args, schedule=schedule)
    assert np.array_equal(out, x[::-1])


def test_bulk_copies_without_a_tensor_map(ptx: str):
    x = np.random.default_rng(0).integers(0, 256, 480, np.uint8)
    out = np.empty_like(x)
    simt.launch(ptx, "bulk_kernel", 1, 32, [x, simt.Output(out), 480], 512)
    assert np.array_equal(out, x)


def test_atomics_of_every_width(ptx: str):
    sums, words, found = np.zeros(8, np.float32), np.zeros(8, np.uint32), np.zeros(64, np.uint32)
    halves, brains = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    simt.launch(ptx, "atomics_kernel", 1, 64, [sums, halves, brains, words, found])
    threads = np.arange(64)
    for parity in (0, 1):
        expected = [32, 64, threads[parity::2].sum(), 16]
        assert sums[4 * parity : 4 * parity + 4].tolist() == expected
    assert (halves.view(np.float16).reshape(4, 2) == [16, 32]).all()
    assert (from_bf16(brains.view(np.uint16)).reshape(4, 2) == [16, 32]).all()
    largest = int((threads * 7 % 31).max())
    assert words[:4].tolist() == [largest, 0, 64 % 10, 64]
    assert words[4:6].view(np.uint64)[0] == 64 << 31
    assert words[6:].view(np.float16)[0] == 64
    assert found.tolist() == threads.tolist()  # each finds what the thread before it left


def test_half_word_atomics(ptx: str):
    sums, ticket, found = np.zeros(2, np.uint16), np.zeros(1, np.uint16), np.zeros(32, np.int32)
    simt.launch(ptx, "half_word_atomics", 1, 32, [sums, ticket, simt.Output(found)])
    assert from_bf16(sums).tolist() == [24, 24]
    assert found.tolist() == list(range(32))
    assert ticket[0] == 32


def test_vector_atomics(ptx: str):
    sums, found = np.zeros(2, np.float32), np.zeros((32, 2), np.float32)
    halves, brains = np.zeros(8, np.float16), np.zeros(8, np.uint16)
    simt.launch(ptx, "vector_atomics", 1, 32, [sums, halves, brains, simt.Output(found)])
    assert sums.tolist() == [32, 496]
    assert np.array_equal(found[:, 0], np.arange(32))
    assert np.array_equal(found[:, 1], np.cumsum(np.arange(32)) - np.arange(32))
    assert halves.tolist() == [32, 64] * 4
    assert from_bf16(brains).tolist() == [32, 64] * 4


@pytest.mark.parametrize("schedule", ["lockstep", 1, 2])
def test_barriers_of_their_own(ptx: str, schedule: str | int):
    x = np.arange(128, dtype=np.int32)
    out = np.zeros(128, np.int32)
    simt.launch(ptx, "relay", 1, 128, [x, simt.Output(out)], schedule=schedule)
    assert np.array_equal(out, np.concatenate([x[64:], x[:64].reshape(2, 32)[:, ::-1].ravel()]))


def test_products_summed_in_half_precision(ptx: str):
    rng = np.random.default_rng(0)
    # Small integers: every product and sum is exact in float16, in whatever order.
    a, b = (rng.integers(-8, 9, (rows, 16)).astype(np.float16) for rows in (16, 8))
    out = np.zeros((2, 16, 8), np.float16)
    simt.launch(ptx, "half_products", 1, 32, [a, b, simt.Output(out)])
    assert np.array_equal(out[0], 1 + a @ b.T)
    assert np.array_equal(out[1], 1 + a[:, :8] @ b[:, :8].T)


def test_warp_collectives(ptx: str):
    x = np.random.default_rng(0).integers(0, 900, 32, np.int32)
    out = np.zeros((8, 32), np.int32)
    simt.launch(ptx, "warp_kernel", 1, 32, [x, simt.Output(out)])
    t = np.arange(32)
    bits = out.view(np.uint32)
    assert (bits[0] == sum(1 << int(i) for i in t[x & 1 == 1])).all()
    assert bits[1].tolist() == [sum(1 << int(i) for i in t[x % 5 == v % 5]) for v in x]
    assert (out[2] == 0).all()  # all lanes, -1, and the predicate, 1
    assert (out[3] == x.max()).all()
    assert (out[4] == np.bitwise_xor.reduce(x)).all()
    up = np.where(t >= 3, x[t - 3], x)
    down = np.where(t % 16 + 5 < 16, x[np.minimum(t + 5, 31)], x)
    assert np.array_equal(out[5], up + 1000 * down)
    assert np.array_equal(out[6], x[t // 8 * 8 + t * 3 % 8])
    assert (out[7] == (x == 7).any() + 2).all()


def test_matrices_are_transposed(ptx: str):
    x = np.random.default_rng(0).integers(0, 1 << 16, (8, 8), np.uint16)
    out = np.zeros((2, 8, 8), np.uint16)
    simt.launch(ptx, "transpose", 1, 32, [x, simt.Output(out)])
    assert np.array_equal(out[0], x.T)
    assert np.array_equal(out[1], x.T)


@pytest.mark.parametrize("schedule", ["lockstep", 1])
def test_table_jumps_and_own_arrays(ptx: str, schedule: str | int):
    x = np.arange(32, dtype=np.int32) * 3
    out = np.zeros(32, np.int32)
    simt.launch(ptx, "paths", 1, 32, [x, simt.Output(out)], schedule=schedule)
    t = np.arange(32)
    assert np.array_equal(out, 10 + 10 * (t % 4) + x[x & 7] + t)


@pytest.mark.parametrize("schedule", ["lockstep", 1, 2, 3, 4])
def test_an_mbarrier_that_moves_on_lets_nobody_past_a_barrier(ptx: str, schedule: str | int):
    x = np.arange(64, dtype=np.int32)
    out = np.zeros(64, np.int32)
    simt.launch(ptx, "staggered", 1, 64, [x, simt.Output(out)], schedule=schedule)
    sums = np.array([x[:n].sum() for n in x[32:]])
    assert np.array_equal(out, np.concatenate([sums, sums]))


def image_of(tile: np.ndarray, swizzle: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """A tile [rows, 16] as TMA leaves it: bytes as uint16, and the descriptor's two offsets.

    Along K: boxes of [rows, span]. Along M or N: boxes of [16 k, span], one behind the other.
    Without swizzle a span is 16 bytes and the two offsets are those of 8 x 16-byte cores.
    """
    array = tile.T if transposed else tile
    span = (swizzle or 16) // 2
    width = array.shape[1]
    boxes = [array[:, at : at + span] for at in range(0, width, span)]
    flat = []
    for box in boxes:
        padded = np.zeros((box.shape[0], span), np.uint16)
        padded[:, : box.shape[1]] = box
        flat.append(padded.reshape(-1))
    linear = np.concatenate(flat)
    byte = np.arange(len(linear)) * 2
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    image = np.empty_like(linear)
    image[(byte ^ ((byte >> 7 & mask) << 4)) // 2] = linear
    box_bytes, group_bytes = array.shape[0] * span * 2, 8 * span * 2
    if not swizzle and transposed:  # the leading offset is along K, the stride along M or N
        return image, group_bytes, box_bytes
    return image, box_bytes, group_bytes


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_wgmma_reads_every_layout(swizzle: int, transpose_a: int, transpose_b: int):
    flags = [f"-DTRANSPOSE_A={transpose_a}", f"-DTRANSPOSE_B={transpose_b}"]
    program = simt.compile_cu(PROGRAMS / "wgmma_layouts.cu", "compute_90a", flags=flags)
    rng = np.random.default_rng(0)
    a, b = (to_bf16(rng.normal(size=(rows, 16)).astype(np.float32)) for rows in (64, 16))
    images, descriptors, begin = [], [], 0
    for tile, transposed in ((a, transpose_a), (b, transpose_b)):
        image, leading, stride = image_of(tile, swizzle, bool(transposed))
        image = np.concatenate([image, np.zeros(-len(image) % 512, np.uint16)])  # 1024 bytes
        code = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
        descriptors.append(begin >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | code << 62)
        images.append(image)
        begin += image.nbytes
    image = np.concatenate(images)
    out = np.empty((64, 16), np.float32)
    args = [image, len(image) // 8, *descriptors, simt.Output(out)]
    simt.launch(program, "wgmma_kernel", 1, 128, args, image.nbytes)
    expected = from_bf16(a).astype(float) @ from_bf16(b).astype(float).T
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


SPINNING = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry spinning_kernel(.param .u64 flag)
{
    .reg .pred %p<2>; .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [flag];
AGAIN:
    ld.volatile.global.u32 %r1, [%rd1];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra AGAIN;
    frobnicate.u32 %r1, %r1;
    ret;
}
"""


def test_a_kernel_that_never_ends_is_a_deadlock():
    with pytest.raises(simt.Fault, match="still running"):
        simt.launch(SPINNING, "spinning", 1, 32, [np.zeros(1, np.uint32)], max_blocks=100)


def test_an_unknown_instruction_is_named_when_it_is_executed():
    with pytest.raises(simt.Fault, match="PTX line 13: frobnicate") as caught:
        simt.launch(SPINNING, "spinning", 1, 32, [np.ones(1, np.uint32)])
    assert caught.value.kind == "unsupported"
