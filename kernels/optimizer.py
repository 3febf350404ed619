"""The optimizer's step over many tensors in one launch, and the norm of all gradients.

Tensors are reached through a table: the addresses of several lists of N tensors, the N sizes in
elements, and the number of the first chunk of each tensor. A program computes one chunk, so the
work of a launch does not depend on how the parameters are cut into tensors.

Source: Loshchilov, Hutter, "Decoupled weight decay regularization", 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk_of_program(table_ptr, num_tensors, LISTS: tl.constexpr, CHUNK: tl.constexpr):
    """The tensor of this program's chunk, where in it the chunk begins, and the tensor's size."""
    program = tl.program_id(0)
    sizes_ptr = table_ptr + LISTS * num_tensors
    chunks_ptr = sizes_ptr + num_tensors
    low = 0
    high = num_tensors
    while high - low > 1:  # an empty tensor begins where the next one does
        middle = (low + high) // 2
        begun = tl.load(chunks_ptr + middle) <= program
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    first = (program - tl.load(chunks_ptr + low)) * CHUNK
    return low, first, tl.load(sizes_ptr + low)


@triton.jit
def _pointer(table_ptr, index, ALIGNED: tl.constexpr):
    """The address at an index of a table as a pointer to float32."""
    address = tl.load(table_ptr + index)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp: exact for a weight of 0 and of 1."""
    change = end - start
    return tl.where(weight < 0.5, start + weight * change, end - change * (1 - weight))


# A number that varies from group to group: no variant is compiled for each.
@triton.jit(do_not_specialize=["num_tensors"])
def step_kernel(
    table_ptr,  # int64, of 5 lists: parameters, gradients, m, v and teacher's parameters
    scale_ptr,  # [] float32, factor on the gradients
    skip_ptr,  # [] bool, or scale_ptr without one
    changing_ptr,  # [4] float64, in place of decay, step_size, 1 / root_correction, momentum_rest
    scale,  # factor on the gradients if there is no tensor of it
    decay,  # 1 - lr * weight decay
    beta1_rest,  # 1 - beta1
    beta2,
    beta2_rest,  # 1 - beta2
    eps,
    step_size,  # lr / (1 - beta1^step)
    root_correction,  # 1 / sqrt(1 - beta2^step)
    momentum_rest,  # 1 - momentum
    num_tensors,  # N
    HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_CHANGING: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW and the moving average on one chunk; nothing is written in a skipped step."""
    tensor, first, size = _chunk_of_program(table_ptr, num_tensors, 5, CHUNK)
    if HAS_SKIP:
        size = tl.where(tl.load(skip_ptr) != 0, 0, size)
    if HAS_SCALE:
        scale = tl.load(scale_ptr)
    if HAS_CHANGING:
        decay = tl.load(changing_ptr).to(tl.float32)
        step_size = tl.load(changing_ptr + 1).to(tl.float32)
        root_correction = 1 / tl.load(changing_ptr + 2).to(tl.float32)
        momentum_rest = tl.load(changing_ptr + 3).to(tl.float32)
    parameter_ptr = _pointer(table_ptr, tensor, ALIGNED)
    gradient_ptr = _pointer(table_ptr, tensor + num_tensors, ALIGNED)
    m_ptr = _pointer(table_ptr, tensor + 2 * num_tensors, ALIGNED)
    v_ptr = _pointer(table_ptr, tensor + 3 * num_tensors, ALIGNED)
    teacher_ptr = _pointer(table_ptr, tensor + 4 * num_tensors, ALIGNED)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        mask = at < size
        g = tl.load(gradient_ptr + at, mask=mask, other=0.0) * scale
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        p = tl.load(parameter_ptr + at, mask=mask, other=0.0)
        m = _lerp(m, g, beta1_rest)
        v = beta2 * v + beta2_rest * g * g
        p = p * decay - step_size * m / (tl.sqrt(v) * root_correction + eps)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        tl.store(parameter_ptr + at, p, mask=mask)
        if HAS_TEACHER:
            teacher = tl.load(teacher_ptr + at, mask=mask, other=0.0)
            tl.store(teacher_ptr + at, _lerp(teacher, p, momentum_rest), mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def squares_kernel(
    table_ptr,  # int64, of 1 list
    sums_ptr,  # [programs] float32
    num_tensors,  # N
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of squares of one chunk; a fixed order, whatever else runs."""
    tensor, first, size = _chunk_of_program(table_ptr, num_tensors, 1, CHUNK)
    gradient_ptr = _pointer(table_ptr, tensor, ALIGNED)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        g = tl.load(gradient_ptr + at, mask=at < size, other=0.0)
        sums += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, 0))
