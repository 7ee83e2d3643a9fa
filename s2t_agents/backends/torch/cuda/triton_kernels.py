"""Triton kernels of a step of few rows; ``triton_decode`` launches them and documents what they compute.

Sizes in capitals are compiled in. Rows of tensors may lie apart (``..._row``, elements), their columns never do.
Arithmetic is fp32, rounded where torch's own functions round. Importing this needs Triton.
"""

# No annotations: what Triton compiles is no Python.

import triton
import triton.language as tl


@triton.jit
def linear(x, weight, bias, out, n_out, N_IN: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """OUT outputs of ``weight [n_out, N_IN] @ x + bias``."""
    outputs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    there = outputs < n_out
    rows = weight + outputs.to(tl.int64)[:, None] * N_IN
    total = tl.zeros([OUT, IN], tl.float32)
    for start in range(0, N_IN, IN):
        inputs = start + tl.arange(0, IN)
        some = inputs < N_IN
        w = tl.load(rows + inputs[None, :], mask=there[:, None] & some[None, :], other=0.0)
        total += w.to(tl.float32) * tl.load(x + inputs, mask=some, other=0.0).to(tl.float32)[None, :]
    sums = tl.sum(total, 1)
    if BIAS:
        sums += tl.load(bias + outputs, mask=there, other=0.0).to(tl.float32)
    tl.store(out + outputs, sums.to(out.dtype.element_ty), mask=there)


@triton.jit
def gate_up_silu(x, weight, out, n_out, N_IN: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """OUT outputs of ``silu(gate @ x) * (up @ x)``; ``weight`` is gate ``[n_out, N_IN]`` and, behind it, up."""
    outputs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    there = outputs < n_out
    gates = weight + outputs.to(tl.int64)[:, None] * N_IN
    ups = weight + (outputs + n_out).to(tl.int64)[:, None] * N_IN
    gate, up = tl.zeros([OUT, IN], tl.float32), tl.zeros([OUT, IN], tl.float32)
    for start in range(0, N_IN, IN):
        inputs = start + tl.arange(0, IN)
        some = inputs < N_IN
        both = there[:, None] & some[None, :]
        one = tl.load(gates + inputs[None, :], mask=both, other=0.0)
        two = tl.load(ups + inputs[None, :], mask=both, other=0.0)
        read = tl.load(x + inputs, mask=some, other=0.0).to(tl.float32)[None, :]
        gate += one.to(tl.float32) * read
        up += two.to(tl.float32) * read
    g = tl.sum(gate, 1).to(out.dtype.element_ty).to(tl.float32)
    u = tl.sum(up, 1).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + outputs, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=there)


@triton.jit
def apply_rope(x, cos, sin, where, real, D: tl.constexpr, WIDE: tl.constexpr):
    """Rotary positions on the heads ``[D]`` that begin at ``where`` ``[..., 1]``; 0 for those that are not ``real``."""
    d = tl.arange(0, WIDE)
    other, sign = (d + D // 2) % D, tl.where(d < D // 2, -1.0, 1.0)
    there = d < D
    c = tl.load(cos + d, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=there, other=0.0).to(tl.float32) * sign
    own = tl.load(x + where + d, mask=real & there, other=0.0).to(tl.float32)
    across = tl.load(x + where + other, mask=real & there, other=0.0).to(tl.float32)
    return (own * c + across * s).to(x.dtype.element_ty)


@triton.jit
def attend_splits(
    q, cos, sin, keys, values, ends, seen, weights, scale, q_row, cos_row, kv_row, kv_head, parts,
    WINDOW: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS rows' queries of one key head over one split of a KV row that SHARE rows share.

    Writes the unweighed sum ``[D]`` to ``seen``, the highest score and the sum of weights to ``weights``.
    """
    first, head, part = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    base = first // SHARE
    end = tl.load(ends + base).to(tl.int32)
    begin, stop = part * PART, tl.minimum(part * PART + PART, end)
    if WINDOW > 0:  # the row's own token takes one place of it
        begin = tl.maximum(begin, end + 1 - WINDOW)
    if begin >= stop:
        return
    m = tl.arange(0, M)
    row, query = first + m // GROUP, head * GROUP + m % GROUP
    real = m < ROWS * GROUP
    at = row * q_row + query * D
    q_rotated = apply_rope(q, cos + base * cos_row, sin + base * cos_row, at[:, None], real[:, None], D, WIDE)
    d = tl.arange(0, WIDE)
    within = base.to(tl.int64) * kv_row + head.to(tl.int64) * kv_head
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    kept = tl.zeros([M, WIDE], tl.float32)
    for block in range(0, PART, BLOCK):
        column = part * PART + block + tl.arange(0, BLOCK)
        visible = (column >= begin) & (column < stop)
        there = visible[:, None] & (d < D)[None, :]
        k = tl.load(keys + within + column[:, None] * D + d[None, :], mask=there, other=0.0)
        v = tl.load(values + within + column[:, None] * D + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q_rotated, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        fade, share = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        total = total * fade + tl.sum(share, 1)
        kept = kept * fade[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        top = higher
    place = (row * tl.num_programs(1) * GROUP + query) * parts + part
    tl.store(seen + place.to(tl.int64)[:, None] * D + d[None, :], kept, mask=real[:, None] & (d < D)[None, :])
    tl.store(weights + 2 * place, top, mask=real)
    tl.store(weights + 2 * place + 1, total, mask=real)


@triton.jit
def merge_splits(
    q, k, v, cos, sin, keys, values, ends, seen, weights, out, scale, q_row, k_row, v_row, cos_row, kv_row, kv_head,
    parts, WINDOW: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Attention of a query head of a row over all splits and the row's own token, whose KV joins the row if WRITES."""
    row, query = tl.program_id(0), tl.program_id(1)
    base, head = row // SHARE, query // GROUP
    end = tl.load(ends + base).to(tl.int32)
    d = tl.arange(0, WIDE)
    c, s = cos + base * cos_row, sin + base * cos_row
    q_own = apply_rope(q, c, s, row * q_row + query * D, d < D, D, WIDE)
    k_own = apply_rope(k, c, s, row * k_row + head * D, d < D, D, WIDE)
    v_own = tl.load(v + row * v_row + head * D + d, mask=d < D, other=0.0)
    if WRITES:
        if query % GROUP == 0:
            place = base.to(tl.int64) * kv_row + head.to(tl.int64) * kv_head + end.to(tl.int64) * D + d
            tl.store(keys + place, k_own, mask=d < D)
            tl.store(values + place, v_own, mask=d < D)
    own = tl.sum(q_own.to(tl.float32) * k_own.to(tl.float32), 0) * scale
    part = tl.arange(0, PARTS)
    begin, stop = part * PART, tl.minimum(part * PART + PART, end)
    if WINDOW > 0:
        begin = tl.maximum(begin, end + 1 - WINDOW)
    held = begin < stop  # the others were not written
    place = (row * tl.num_programs(1) + query) * parts + part
    tops = tl.load(weights + 2 * place, mask=held, other=float("-inf"))
    totals = tl.load(weights + 2 * place + 1, mask=held, other=0.0)
    top = tl.maximum(tl.max(tops, 0), own)
    shares, share = tl.exp(tops - top), tl.exp(own - top)
    there = held[:, None] & (d < D)[None, :]
    pieces = tl.load(seen + place.to(tl.int64)[:, None] * D + d[None, :], mask=there, other=0.0)
    whole = tl.sum(pieces * shares[:, None], 0) + share * v_own.to(tl.float32)
    whole /= tl.sum(totals * shares, 0) + share
    tl.store(out + (row * tl.num_programs(1) + query) * D + d, whole.to(out.dtype.element_ty), mask=d < D)
