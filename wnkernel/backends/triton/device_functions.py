"""The work of one program of the Triton kernels: w = g * v / n and its derivative, where n is
max(norm, eps), or norm - eps if eps is negative (csrc/weight_norm.h).

The forward reads v and writes w, and v if its norms are forced. The backward reads v and grad_w,
and writes grad_v. If a row does not fit into a line of one tile, the inputs are read twice. Without
the help of a cache that is 1.5 times the traffic in the forward and 1.67 times in the backward.
Lines whose size is no multiple of 16 bytes are slow too, because a thread accesses one element at a
time.

If a sum of squares leaves the safe range of floats, the rows are multiplied by a power of two,
``unit``, before they are squared. The backward divides by the stored norm, so a norm must be a
normal number with a normal reciprocal there (1.2e-38 to 8.5e37 in float32). Sums are float64 for
float64 and float32 otherwise. There are no atomic operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import (
    ROWS,
    chunk_of,
    load,
    narrow,
    partial_sums,
    row_sums,
    rows_of,
    store,
    store_at,
    store_partial_sum,
    tile_of,
    widen,
)


@triton.jit
def _unit(squares):
    """Return the power of two for rows with this sum of squares; 1 except for extreme rows."""
    if squares.dtype == tl.float64:
        return tl.where(squares > 2.0**900, 2.0**-600, tl.where(squares < 2.0**-800, 2.0**700, 1.0))
    else:
        return tl.where(squares > 2.0**100, 2.0**-86, tl.where(squares < 2.0**-80, 2.0**90, 1.0))


@triton.jit
def _any(x):
    return tl.max(tl.max(x.to(tl.int32), 1), 0) > 0


@triton.jit
def _is_normal(x):
    if x.dtype == tl.float64:
        return (tl.abs(x) >= 2.0**-1022) & (tl.abs(x) < float("inf"))
    else:
        return (tl.abs(x) >= 2.0**-126) & (tl.abs(x) < float("inf"))


@triton.jit
def _float(bits, ACC: tl.constexpr):
    return bits.to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def _squares(
    v, unit, start, end, strip, plan, ACC: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the sum of the squares of ``unit * v`` over all tiles, for each place of a tile."""
    sums = tl.zeros([LINES, COLUMNS], ACC)
    for tile in range(start, end):
        origin, offsets, mask = tile_of(tile, strip, plan, KIND, LINES, COLUMNS, VECTOR)
        x = load(v, origin, offsets, mask, ACC, VECTOR) * unit
        sums += x * x
    return sums


@triton.jit
def _divisor(norm, rows, V: tl.constexpr, G: tl.constexpr):
    """Return the divisors of v. These are the norms, with one exception: if there is one norm over
    all of v, and v and g have half types, v is divided by the norm rounded to the type of g, if
    that is a normal number."""
    if V.primitive_bitwidth == 16 and G.primitive_bitwidth == 16:
        held = widen(narrow(norm, G), norm.dtype)
        SMALLEST: tl.constexpr = 2.0**-14 if G == tl.float16 else 2.0**-126
        is_normal = (held >= SMALLEST) & (held < float("inf"))
        return tl.where((rows == 1) & is_normal, held, norm)
    else:
        return norm


@triton.jit
def _bounded(norm, eps):
    """Return n for a norm. A bound is never negative, so a negative eps is one to add."""
    return tl.where(eps < 0.0, norm - eps, tl.where(norm < eps, eps, norm))


@triton.jit
def _ratio(a, b):
    """Return a / b. GPUs may round a quotient of equal numbers to something else than 1, but w must
    be v if g is the norm."""
    return tl.where(a == b, 1.0, a / b)


@triton.jit
def _finish_norm(p, mask, squares, unit, scale, rows, eps_bits, V: tl.constexpr, G: tl.constexpr):
    """Compute norms from ``squares``, which are multiplied by ``unit`` squared, and store them.

    Return two factors whose product is g / n, to multiply v with one after the other. They are
    g / n and 1 if g / n is a normal number, else 1 / n and g if 1 / n is one, and else the unit and
    the rest of g / n."""
    norm = tl.sqrt(squares)
    true_norm = tl.where(unit == 1.0, norm, norm / unit)
    tl.store(p, true_norm, mask=mask)
    eps = _float(eps_bits, norm.dtype)
    n = _bounded(_divisor(true_norm, rows, V, G), eps)
    ratio, inverse = _ratio(scale, n), 1.0 / n
    has_ratio = _is_normal(n) & _is_normal(ratio)
    has_inverse = _is_normal(n) & _is_normal(inverse)
    bound = eps * unit
    rest = scale / tl.where(eps < 0.0, norm - bound, tl.where(true_norm < eps, bound, norm))
    a = tl.where(has_ratio, ratio, tl.where(has_inverse, inverse, unit))
    return a, tl.where(has_ratio, 1.0, tl.where(has_inverse, scale, rest))


@triton.jit
def _force_norm(
    p, mask, squares, unit, scale, rows, eps_bits, forced_bits, V: tl.constexpr, G: tl.constexpr
):
    """Compute the norms of the new v if norms are forced, and store them. Return two factors that
    make the new v of v, and one that makes w of the new v.

    Everything is in units of the row, so an eps of 2^38 or more is infinite for a tiny row. A row
    of zeros stays. More cases would take registers that the other branch does not need."""
    norm = tl.sqrt(squares)
    eps, forced = _float(eps_bits, norm.dtype), _float(forced_bits, norm.dtype)
    n = _bounded(norm, eps * unit)
    b = forced / tl.where(n == 0.0, 1.0, n)
    norm *= b
    tl.store(p, norm, mask=mask)
    n = _bounded(_divisor(norm, rows, V, G), eps)
    return unit, b, scale / tl.where(n == 0.0, 1.0, n)


@triton.jit
def _factors(
    p, mask, squares, unit, scale, rows, eps_bits, forced_bits, V: tl.constexpr, G: tl.constexpr
):
    """Store norms, and return three factors of w, to multiply v with one after the other. The first
    two make the new v if norms are forced; otherwise the third is 1."""
    if forced_bits != 0:
        a, b, c = _force_norm(p, mask, squares, unit, scale, rows, eps_bits, forced_bits, V, G)
    else:
        a, b = _finish_norm(p, mask, squares, unit, scale, rows, eps_bits, V, G)
        c = tl.zeros_like(b) + 1.0
    return a, b, c


@triton.jit
def _store_scaled(v, w, origin, offsets, x, a, b, c, forced_bits, mask, VECTOR: tl.constexpr):
    """Store w for elements x of v, and also the new v if norms are forced. The factors are those of
    _factors."""
    x = x * a * b
    store_at(w, origin, offsets, x * c, mask, VECTOR)
    if forced_bits != 0:
        # No forced norm is negative, so 0 is added. But the compiler does not know this, so that it
        # keeps no addresses of v in registers.
        store_at(v, origin + (forced_bits >> 63), offsets, x, mask, VECTOR)


@triton.jit
def _inverse_and_part(norm, eps):
    """Return 1 / n, and by what s is multiplied along u in grad_v: 1 under a bound that is not
    reached, 0 below it, and n / norm if eps is added. Where that overflows, as in rows of zeros,
    u is too small to count."""
    n = _bounded(norm, eps)
    part = tl.where(norm < eps, 0.0, tl.zeros_like(norm) + 1.0)
    if eps < 0.0:
        part = n / norm
        part = tl.where(part < float("inf"), part, 0.0)
    return 1.0 / n, part


@triton.jit
def _finish_ratio(scale, inverse):
    """Return two factors whose product is g / n, to multiply with one after the other. They are
    g / n and 1 if g / n is a normal number or 0, and else 1 / n and g."""
    ratio = scale * inverse
    has_ratio = _is_normal(ratio) | (scale == 0.0)
    return tl.where(has_ratio, ratio, inverse), tl.where(has_ratio, 1.0, scale)


@triton.jit
def forward_rows(
    v, g, w, norm, eps_bits, forced_bits, strip, plan,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Run a forward where each row is a line of one tile, which stays on chip."""
    ACC: tl.constexpr = norm.dtype.element_ty
    row, valid, _ = rows_of(strip, plan, ROWS, LINES, COLUMNS)
    origin, offsets, mask = tile_of(0, strip, plan, ROWS, LINES, COLUMNS, VECTOR)
    x = load(v, origin, offsets, mask, ACC, VECTOR)
    squares = tl.sum(x * x, 1, keep_dims=True)
    unit = tl.where(valid, _unit(squares), 1.0).to(ACC)
    if _any(unit != 1.0):
        squares = tl.sum((x * unit) * (x * unit), 1, keep_dims=True)
    scale = widen(tl.load(g + row, mask=valid, other=0.0), ACC)
    a, b, c = _factors(
        norm + row, valid, squares, unit, scale, plan[0], eps_bits, forced_bits,
        v.dtype.element_ty, g.dtype.element_ty,
    )  # fmt: skip
    _store_scaled(v, w, origin, offsets, x, a, b, c, forced_bits, mask, VECTOR)


@triton.jit
def forward_tiles(
    v, g, w, norm, partials, eps_bits, forced_bits, program, plan,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Run a forward where rows extend over many tiles, in three steps. Step 1 sums up squares tile
    by tile. Step 2 is for split rows only: each program stores its sums, and the second launch
    (FINISH) adds them up. Step 3 computes norms and w."""
    ACC: tl.constexpr = norm.dtype.element_ty
    rows, inner, _lines, _pitch, _strip_rows, _width, _numel, per_chunk, tiles, split = plan
    strip, chunk, start, end = chunk_of(program, per_chunk, tiles, split)
    row, valid, first = rows_of(strip, plan, KIND, LINES, COLUMNS)
    if FINISH:
        p, there = partial_sums(partials, strip, split, 1, 2, KIND, COLUMNS)
        units = tl.load(p, mask=there, other=float("inf"))
        unit = tl.min(units, 1)
        ratio = tl.where(units == unit[:, None, :], 1.0, unit[:, None, :] / units)
        p, there = partial_sums(partials, strip, split, 0, 2, KIND, COLUMNS)
        sums = tl.load(p, mask=there, other=0.0)
        squares = tl.sum(sums * ratio * ratio, 1)
    else:
        sums = _squares(v, 1.0, start, end, strip, plan, ACC, KIND, LINES, COLUMNS, VECTOR)
        squares = row_sums(sums, rows, inner, KIND, COLUMNS)
        unit = tl.where(valid, _unit(squares), 1.0).to(ACC)
        if _any(unit != 1.0):
            sums = _squares(v, unit, start, end, strip, plan, ACC, KIND, LINES, COLUMNS, VECTOR)
            squares = row_sums(sums, rows, inner, KIND, COLUMNS)
        if split > 1:
            store_partial_sum(partials, program, 0, squares, 2, KIND, COLUMNS)
            store_partial_sum(partials, program, 1, unit, 2, KIND, COLUMNS)
    if FINISH or split == 1:
        scale = widen(tl.load(g + row, mask=valid, other=0.0), ACC)
        a, b, c = _factors(
            norm + row, first & (chunk == 0), squares, unit, scale, rows, eps_bits, forced_bits,
            v.dtype.element_ty, g.dtype.element_ty,
        )  # fmt: skip
        for tile in range(start, end):
            origin, offsets, mask = tile_of(tile, strip, plan, KIND, LINES, COLUMNS, VECTOR)
            x = load(v, origin, offsets, mask, ACC, VECTOR)
            _store_scaled(v, w, origin, offsets, x, a, b, c, forced_bits, mask, VECTOR)


@triton.jit
def backward_rows(
    grad_w, v, g, norm, grad_v, grad_g, eps_bits, strip, want_v, want_g, plan,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Run a backward where each row is a line of one tile. With u = v / n: grad_g = s = <grad_w, u>
    and grad_v = (g / n) (grad_w - u s part); _inverse_and_part says what part is."""
    ACC: tl.constexpr = norm.dtype.element_ty
    row, valid, _ = rows_of(strip, plan, ROWS, LINES, COLUMNS)
    origin, offsets, mask = tile_of(0, strip, plan, ROWS, LINES, COLUMNS, VECTOR)
    u = load(v, origin, offsets, mask, ACC, VECTOR)
    grad = load(grad_w, origin, offsets, mask, ACC, VECTOR)
    length = tl.load(norm + row, mask=valid, other=1.0)
    inverse, part = _inverse_and_part(length, _float(eps_bits, ACC))
    u *= inverse
    s = tl.sum(grad * u, 1, keep_dims=True)
    if want_g:
        store(grad_g + row, s, valid)
    if want_v:
        scale = widen(tl.load(g + row, mask=valid, other=0.0), ACC)
        a, b = _finish_ratio(scale, inverse)
        along = tl.where(part == 0.0, 0.0, s * part)
        store_at(grad_v, origin, offsets, (grad - u * along) * a * b, mask, VECTOR)


@triton.jit
def backward_tiles(
    grad_w, v, g, norm, grad_v, grad_g, partials, eps_bits, program, want_v, want_g, plan,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Run a backward where rows extend over many tiles, in the three steps of forward_tiles."""
    ACC: tl.constexpr = norm.dtype.element_ty
    rows, inner, _lines, _pitch, _strip_rows, _width, _numel, per_chunk, tiles, split = plan
    strip, chunk, start, end = chunk_of(program, per_chunk, tiles, split)
    if FINISH:  # sums are added up first, while no other values take registers
        p, there = partial_sums(partials, strip, split, 0, 1, KIND, COLUMNS)
        s = tl.sum(tl.load(p, mask=there, other=0.0), 1)
    row, valid, first = rows_of(strip, plan, KIND, LINES, COLUMNS)
    length = tl.load(norm + row, mask=valid, other=1.0)
    inverse, part = _inverse_and_part(length, _float(eps_bits, ACC))
    if not FINISH:
        sums = tl.zeros([LINES, COLUMNS], ACC)
        for tile in range(start, end):
            origin, offsets, mask = tile_of(tile, strip, plan, KIND, LINES, COLUMNS, VECTOR)
            u = load(v, origin, offsets, mask, ACC, VECTOR) * inverse
            sums += load(grad_w, origin, offsets, mask, ACC, VECTOR) * u
        s = row_sums(sums, rows, inner, KIND, COLUMNS)
        if split > 1:
            store_partial_sum(partials, program, 0, s, 1, KIND, COLUMNS)
    if FINISH or split == 1:
        if want_g:
            store(grad_g + row, s, first & (chunk == 0))
        if want_v:
            scale = widen(tl.load(g + row, mask=valid, other=0.0), ACC)
            a, b = _finish_ratio(scale, inverse)
            along = tl.where(part == 0.0, 0.0, s * part)
            for tile in range(start, end):
                origin, offsets, mask = tile_of(tile, strip, plan, KIND, LINES, COLUMNS, VECTOR)
                u = load(v, origin, offsets, mask, ACC, VECTOR) * inverse
                grad = load(grad_w, origin, offsets, mask, ACC, VECTOR)
                x = (grad - u * along) * a * b
                store_at(grad_v, origin, offsets, x, mask, VECTOR)


@triton.jit
def forward_program(
    v, g, w, norm, partials, eps_bits, forced_bits, program, plan,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Run one program of a forward, for a single weight as well as for a weight of a list."""
    if KIND == ROWS:
        forward_rows(v, g, w, norm, eps_bits, forced_bits, program, plan, LINES, COLUMNS, VECTOR)
    else:
        forward_tiles(
            v, g, w, norm, partials, eps_bits, forced_bits, program, plan,
            KIND, LINES, COLUMNS, VECTOR, FINISH,
        )  # fmt: skip


@triton.jit
def backward_program(
    grad_w, v, g, norm, grad_v, grad_g, partials, eps_bits, program, want_v, want_g, plan,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Run one program of a backward, for a single weight as well as for a weight of a list."""
    if KIND == ROWS:
        backward_rows(
            grad_w, v, g, norm, grad_v, grad_g, eps_bits, program, want_v, want_g, plan,
            LINES, COLUMNS, VECTOR,
        )  # fmt: skip
    else:
        backward_tiles(
            grad_w, v, g, norm, grad_v, grad_g, partials, eps_bits, program, want_v, want_g, plan,
            KIND, LINES, COLUMNS, VECTOR, FINISH,
        )  # fmt: skip
