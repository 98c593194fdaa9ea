"""What happens to the rows of a chunk between its products: one kernel before, one amid, one after them.

    gather    rows in the order of their clusters, norms, s_i, sums of unit rows; the margin loss
    settle    log Z from the sums of the tiles, and all that a row and its products are scaled by
    finish    gradient of the rows: scaled, less the own positive's share, through the normalisation

The own positive is kept apart from the weights: neither loss nor gradient is a difference of near-equals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .objective import margin_slope
from .tiles import LOG2_E, inverse_norm, product_tile, read_scalar, row_starts
from .weights import SAFE_TEMPERATURE, log2_add, log2_of_sums, without_slope

BATCH_SIZES = ["num_rows", "num_positives", "num_parts", "num_margin_parts", "num_shares", "most_mates"]
BATCH_SIZES += ["margins_stride"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def gather_kernel(
    x_ptr,  # (M, D)
    order_ptr,  # (R,) int64: the row of x that is row i
    y_ptr,  # (n, D) positives
    y_inverse_ptr,  # (n,) 1/‖y_j‖
    own_ptr,  # (R,) int64: the positive of row i
    low_ptr,  # (R,) int64: the mates of row i are the positives low ≤ j < high, but for its own
    high_ptr,  # (R,) int64
    copy_ptr,  # out (R, D) these rows, contiguous
    x_inverse_ptr,  # out (R,) 1/‖x_i‖
    positive_ptr,  # s_i (R,), out with sums
    sums_ptr,  # out (programs, 2 · D) float32: sums of the unit rows of x and of the positives
    slopes_ptr,  # out (R, most_mates) int8, from each row's first mate on; none where it has more
    margin_partial_ptr,  # out (3, parts, R), a part for each program of a row: as `weights_kernel` has it
    alpha,
    beta,
    num_rows,
    num_positives,
    num_margin_parts,
    most_mates,
    dim,
    x_stride,
    y_stride,
    HAS_ORDER: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MARGIN_PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles, shares of the mates). Δ = cos(a_i, p_j) − s_i, margin relu(Δ+α) + relu(−Δ−β)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    share = tl.program_id(1)
    first_share = row_mask & (share == 0)  # the others need norms and s_i too, and do not write them
    source = rows
    if HAS_ORDER:
        source = tl.load(order_ptr + rows, mask=row_mask, other=0)
    x_rows = row_starts(x_ptr, source, x_stride)
    if HAS_OWN:
        own = tl.load(own_ptr + rows, mask=row_mask, other=-1).to(tl.int32)
        p_rows = row_starts(y_ptr, tl.maximum(own, 0), y_stride)
    x_square = tl.zeros((BLOCK_M,), tl.float32)
    p_square, both = x_square, x_square
    for start in range(0, dim, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = row_mask[:, None] & (d < dim)
        x = tl.load(x_rows + d, mask=mask, other=0.0)
        if HAS_COPY:
            tl.store(row_starts(copy_ptr, rows, dim) + d, x, mask=first_share[:, None] & (d < dim))
        x = x.to(tl.float32)
        x_square += tl.sum(x * x, axis=1)
        if HAS_SUMS:
            p = tl.load(p_rows + d, mask=mask, other=0.0).to(tl.float32)
            p_square += tl.sum(p * p, axis=1)
            both += tl.sum(x * p, axis=1)
    x_inverse = inverse_norm(x_square)
    tl.store(x_inverse_ptr + rows, x_inverse, mask=first_share)
    if HAS_SUMS:
        p_inverse = inverse_norm(p_square)
        positive = both * x_inverse * p_inverse
        tl.store(positive_ptr + rows, positive, mask=first_share)
        for start in range(0, tl.where(share == 0, dim, 0), BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = row_mask[:, None] & (d < dim)[None, :]
            sums = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * dim) + d
            x = tl.load(x_rows + d[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(sums, tl.sum(x * x_inverse[:, None], axis=0), mask=d < dim)
            p = tl.load(p_rows + d[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(sums + dim, tl.sum(p * p_inverse[:, None], axis=0), mask=d < dim)
    if HAS_LOW:
        if not HAS_SUMS:
            positive = tl.load(positive_ptr + rows, mask=row_mask, other=0.0)
        low = tl.load(low_ptr + rows, mask=row_mask, other=0).to(tl.int32)
        high = tl.load(high_ptr + rows, mask=row_mask, other=0).to(tl.int32)
        high = tl.where(high - low <= most_mates, high, low)
        first = tl.min(tl.where(high > low, low, num_positives), axis=0) // BLOCK_N * BLOCK_N
        upper, lower = read_scalar(alpha, False), read_scalar(beta, False)
        at_zero = tl.maximum(upper, 0.0) + tl.maximum(-lower, 0.0)
        slope_sum = tl.zeros((BLOCK_M,), tl.float32)
        margin_sum, along = slope_sum, slope_sum
        x_rows = row_starts(x_ptr, tl.where(row_mask, source, 0), x_stride)  # `product_tile` reads all rows
        for start in range(first + share * BLOCK_N, tl.max(high, axis=0), tl.num_programs(1) * BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            safe_columns = tl.minimum(columns, num_positives - 1)
            y_rows = row_starts(y_ptr, safe_columns, y_stride)
            products, _, _ = product_tile(x_rows, y_rows, dim, False, False, PRECISION, UPCAST, BLOCK_D)
            y_inverse = tl.load(y_inverse_ptr + safe_columns)
            delta = products * x_inverse[:, None] * y_inverse[None, :] - positive[:, None]
            mates = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
            if HAS_OWN:
                mates = mates & (columns[None, :] != own[:, None])
            slope = tl.where(mates, margin_slope(delta, upper, lower), 0.0)
            if HAS_SLOPES:
                starts = tl.arange(0, BLOCK_M) * most_mates - low  # 32 bits will do within a tile
                at = slopes_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * most_mates
                tl.store(at + (starts[:, None] + columns[None, :]), slope.to(tl.int8), mask=mates)
            if HAS_MARGIN_PARTIAL:
                margin = tl.maximum(delta + upper, 0.0) + tl.maximum(-delta - lower, 0.0) - at_zero
                slope_sum += tl.sum(slope, axis=1)
                margin_sum += tl.sum(tl.where(mates, margin, 0.0), axis=1)
                along += tl.sum(slope * delta, axis=1)
        if HAS_MARGIN_PARTIAL:
            few = row_mask & (high > low)
            step = num_margin_parts.to(tl.int64) * num_rows
            at = margin_partial_ptr + share.to(tl.int64) * num_rows + rows
            tl.store(at, slope_sum, mask=few)
            tl.store(at + step, margin_sum, mask=few)
            tl.store(at + 2 * step, along, mask=few)


@triton.jit
def _rounded(value, row, column):
    """Float32 to bfloat16, up or down by a hash of the place: sums keep what single ones would swallow."""
    hashed = row.to(tl.uint32) * 0x9E3779B1 + column.to(tl.uint32) * 0x85EBCA77
    hashed = (hashed ^ (hashed >> 15)) * 0x2C1B3C6D
    bits = value.to(tl.uint32, bitcast=True) + (hashed >> 16)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=BATCH_SIZES)
def settle_kernel(
    partial_ptr,  # (parts, R): sums of each part of a row, by column tiles, log2 of them with LOGS
    margin_partial_ptr,  # (3, parts of the positives, R), from `weights_kernel` or `gather_kernel`
    low_ptr,  # (R,) as there
    high_ptr,
    positive_ptr,  # (R,) s_i
    reference_ptr,  # (R,) log2, what the sums are relative to; out with LOGS, unless it adds to log_others
    log_others_ptr,  # in and out (R,) log2 Σ E of all but the own positive
    log_own_column_ptr,  # (R,) log2 likewise, over the column of the own positive
    margins_ptr,  # in and out, at the chunk's place in (3, M): Σ slope, margins, slope·Δ
    x_ptr,  # (R, D)
    x_inverse_ptr,  # (R,)
    y_inverse_ptr,  # (positives,)
    weights_ptr,  # in and out (R, ·): slopes that ride on them are added, times what belongs to them
    row_scale_ptr,  # out (R,) 1/(BτZ), Z relative to the reference
    own_weight_ptr,  # out (R,): what pulls a row and its own positive together
    share_ptr,  # out (R, D) unit rows times row_scale, in the dtype of the weights
    rest_ptr,  # out (R, D) what that dtype has lost
    temperature,  # τ, a number or a pointer
    batch,  # B, twice that where the positives look for their anchors too
    slope_scale,  # λ/B²
    num_rows,
    num_parts,
    num_margin_parts,
    num_shares,
    most_mates,
    margins_stride,
    dim,
    weights_stride,
    LOGS: tl.constexpr,
    SKIPS: tl.constexpr,  # a τ that only the device knows may need no reference
    PART: tl.constexpr,  # columns of one
    HAS_PARTIAL: tl.constexpr,
    HAS_MARGIN_PARTIAL: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_LOG_OTHERS: tl.constexpr,
    HAS_LOG_OWN_COLUMN: tl.constexpr,
    HAS_MARGINS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    HAS_REST: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles,). Without row_scale for the totals alone."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    positive = tl.load(positive_ptr + rows, mask=row_mask, other=0.0) * (LOG2_E / tau)
    if HAS_PARTIAL:
        total = tl.zeros((BLOCK_M,), tl.float32)
        if LOGS:
            total += float("-inf")
        for start in range(0, num_parts, BLOCK_N):
            parts = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask = (parts < num_parts)[:, None] & row_mask[None, :]
            at = partial_ptr + parts[:, None] * num_rows + rows[None, :]
            if LOGS:
                total = log2_add(total, log2_of_sums(tl.load(at, mask=mask, other=0.0), mask, 0))
            else:
                total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        if LOGS and not HAS_LOG_OTHERS:
            log_z = log2_add(total, positive)
            if SKIPS:
                log_z = tl.where(tau < SAFE_TEMPERATURE, log_z, 0.0)
            tl.store(reference_ptr + rows, log_z, mask=row_mask)
    reference = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_REFERENCE and not LOGS:
        reference = tl.load(reference_ptr + rows, mask=row_mask, other=0.0)
    if HAS_LOG_OTHERS:
        if LOGS:
            known = tl.load(log_others_ptr + rows, mask=row_mask, other=0.0)
            tl.store(log_others_ptr + rows, log2_add(known, total), mask=row_mask)
        elif HAS_PARTIAL:
            tl.store(log_others_ptr + rows, tl.log2(total) + reference, mask=row_mask)
        else:
            total = tl.exp2(tl.load(log_others_ptr + rows, mask=row_mask, other=0.0) - reference)

    if HAS_MARGINS:
        low = tl.load(low_ptr + rows, mask=row_mask, other=0)
        high = tl.load(high_ptr + rows, mask=row_mask, other=0)
        many = (high - low > most_mates) & row_mask
        slope_sum = tl.load(margins_ptr + rows, mask=row_mask, other=0.0)
        if HAS_MARGIN_PARTIAL:
            few = (high > low) & row_mask & (high - low <= most_mates)
            first = tl.where(many, low // PART, tl.where(few, 0, 2**30))
            last = tl.where(many, tl.cdiv(high, PART), tl.where(few, num_shares, 0))
            lowest, highest = tl.min(first, axis=0), tl.max(last, axis=0)
            for which in tl.static_range(3):
                total_margin = tl.zeros((BLOCK_M,), tl.float32)
                for start in range(lowest, highest, BLOCK_N):
                    parts = start + tl.arange(0, BLOCK_N)[:, None]
                    mask = (parts >= first[None, :]) & (parts < last[None, :])
                    place = (parts + which * num_margin_parts).to(tl.int64) * num_rows + rows[None, :]
                    found = tl.load(margin_partial_ptr + place, mask=mask, other=0.0)
                    total_margin += tl.sum(found, axis=0)
                at = margins_ptr + which * margins_stride.to(tl.int64) + rows
                total_margin += tl.load(at, mask=row_mask, other=0.0)
                tl.store(at, total_margin, mask=row_mask)
                if which == 0:
                    slope_sum = total_margin

    if HAS_ROW_SCALE:
        z = total + tl.exp2(positive - reference)
        share = total / z
        if HAS_LOG_OWN_COLUMN:
            log_column = tl.load(log_own_column_ptr + rows, mask=row_mask, other=0.0)
            share += tl.exp2(log_column - log2_add(log_column, positive))
        own_weight = share / (batch * tau)
        row_scale = 1.0 / (batch * tau * z)
        if HAS_MARGINS:
            own_weight += slope_sum * slope_scale
        tl.store(row_scale_ptr + rows, row_scale, mask=row_mask)
        tl.store(own_weight_ptr + rows, own_weight, mask=row_mask)
        if HAS_WEIGHTS:
            LOW: tl.constexpr = 1 if weights_ptr.dtype.element_ty == tl.float32 else 65536
            first_mate = tl.min(tl.where(many, low, high), axis=0)
            last_mate = tl.max(tl.where(many, high, 0), axis=0)
            weight_rows = row_starts(weights_ptr, rows, weights_stride)
            for start in range(first_mate, last_mate, BLOCK_D):
                columns = (start + tl.arange(0, BLOCK_D))[None, :]
                mask = many[:, None] & (columns >= low[:, None]) & (columns < high[:, None])
                weight = tl.load(weight_rows + columns, mask=mask, other=0.0)
                e, slope = without_slope(weight, LOW)
                y_inverse = tl.load(y_inverse_ptr + columns, mask=columns < last_mate, other=0.0)
                e += slope * y_inverse * (slope_scale / row_scale)[:, None]
                if weight.dtype == tl.bfloat16:
                    e = _rounded(e, rows[:, None], columns)
                tl.store(weight_rows + columns, e.to(weight.dtype), mask=mask)
        if HAS_SHARE:
            scale = (tl.load(x_inverse_ptr + rows, mask=row_mask, other=0.0) * row_scale)[:, None]
            x_rows = row_starts(x_ptr, rows, dim)
            for start in range(0, dim, BLOCK_D):
                d = (start + tl.arange(0, BLOCK_D))[None, :]
                mask = row_mask[:, None] & (d < dim)
                exact = tl.load(x_rows + d, mask=mask, other=0.0).to(tl.float32) * scale
                rounded = exact.to(share_ptr.dtype.element_ty)
                tl.store(row_starts(share_ptr, rows, dim) + d, rounded, mask=mask)
                if HAS_REST:
                    rest = (exact - rounded.to(tl.float32)).to(rest_ptr.dtype.element_ty)
                    tl.store(row_starts(rest_ptr, rows, dim) + d, rest, mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def finish_kernel(
    gradient_ptr,  # (R, D) float32
    scale_ptr,  # (R,) factor of that
    z_ptr,  # (R, D)
    inverse_ptr,  # (R,) 1/‖z‖
    partner_ptr,  # (·, D)
    partner_index_ptr,  # (R,) int64: the row of partner that pulls on row i; −1 for none
    partner_weight_ptr,  # (R,)
    partner_inverse_ptr,  # (·,) 1/‖partner‖, a factor where it is given
    index_ptr,  # (R,) int64: the row of `out` that row i goes to
    out_ptr,  # out (·, D)
    along_ptr,  # out (R,) u·du
    unit_ptr,  # in and out (·, D) float32, likewise: du is added to it, and nothing else is done
    num_rows,
    dim,
    z_stride,
    partner_stride,
    SCALED: tl.constexpr,  # the gradient is over ‖z‖ already, as weights that carry the norms give it
    HAS_SCALE: tl.constexpr,
    HAS_PARTNER: tl.constexpr,
    HAS_PARTNER_INVERSE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_ALONG: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles,). dz = (du − u (u·du)) / ‖z‖ with du = gradient · scale − partner · its weight."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    inverse = tl.load(inverse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    scale = tl.zeros((BLOCK_M, 1), tl.float32) + 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
    if HAS_PARTNER:
        partner = tl.load(partner_index_ptr + rows, mask=row_mask, other=-1)
        pulled = partner >= 0
        pull = tl.load(partner_weight_ptr + rows, mask=pulled, other=0.0)
        if HAS_PARTNER_INVERSE:
            pull *= tl.load(partner_inverse_ptr + partner, mask=pulled, other=0.0)
        pull, pulled = pull[:, None], pulled[:, None]
        partner_rows = row_starts(partner_ptr, partner, partner_stride)
    z_rows, gradient_rows = row_starts(z_ptr, rows, z_stride), row_starts(gradient_ptr, rows, dim)
    target = rows
    if HAS_INDEX:
        target = tl.load(index_ptr + rows, mask=row_mask, other=0)
    along = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = row_mask[:, None] & (d < dim)
        du = tl.load(gradient_rows + d, mask=mask, other=0.0) * scale
        if HAS_PARTNER:
            du -= tl.load(partner_rows + d, mask=mask & pulled, other=0.0).to(tl.float32) * pull
        if HAS_UNIT:
            at = row_starts(unit_ptr, target, dim) + d
            tl.store(at, tl.load(at, mask=mask, other=0.0) + du, mask=mask)
        else:
            along += tl.load(z_rows + d, mask=mask, other=0.0).to(tl.float32) * du
    if not HAS_UNIT:
        along = tl.sum(along, axis=1)[:, None] * inverse
        if HAS_ALONG:
            tl.store(along_ptr + rows[:, None], along, mask=row_mask[:, None])
        for start in range(0, dim, BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D))[None, :]
            mask = row_mask[:, None] & (d < dim)
            du = tl.load(gradient_rows + d, mask=mask, other=0.0) * scale
            if HAS_PARTNER:
                du -= tl.load(partner_rows + d, mask=mask & pulled, other=0.0).to(tl.float32) * pull
            dz = du - tl.load(z_rows + d, mask=mask, other=0.0).to(tl.float32) * inverse * along
            if not SCALED:
                dz = dz * inverse
            tl.store(row_starts(out_ptr, target, dim) + d, dz.to(out_ptr.dtype.element_ty), mask=mask)
