"""The masked objective over finished cosines: InfoNCE, false negatives, margin loss, all sums, in one launch.

One program owns a few whole rows of the cosines, so that every row sum is local. For the gradients a second
pass over the same rows writes W_ij = w_ij / (‖a_i‖ ‖p_j‖) in the place of S, w = Bτ · ∂loss/∂S:

    w_ij = softmax_ij + λτ/B · slope_ij,  w_ii = −Σ_{j≠i} w_ij

The last program to arrive adds up the terms, in a fixed order.

Notation (method.md): S_ij cosines, s_i = S_ii, G_ik cosines with the centroids, τ the temperature, n_ik how
often centroid k stands in the denominator of row i. Logits are kept in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    BML,
    EXCLUDE,
    KEEP,
    LN_2,
    LOG2_E,
    LOWEST,
    counters,
    is_last_to_arrive,
    load_row,
    padded,
    read_scalar,
    row_starts,
    wait_for_the_launch_before,
)

BATCH_SIZES = ["num_rows", "num_negatives", "num_centroids"]

# Rows of the output `terms`.
TERMS = (
    "info_nce",
    "bml",
    "mean_cosine",
    "positive_cosine",
    "nearest_cosine",
    "hard_negative_cosine",
    "with_mates",
    "temperature_gradient",
)


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1], accurate also where e is tiny: 2·artanh(e / (2 + e))."""
    t = e / (2.0 + e)
    square = t * t
    series = 0.0 * square
    for odd in tl.static_range(15, -1, -2):
        series = series * square + 1.0 / odd
    return 2.0 * t * series


@triton.jit
def margin_slope(delta, alpha, beta):
    """∂/∂Δ of relu(Δ+α) + relu(−Δ−β): −1, 0 or 1."""
    return (delta + alpha > 0).to(tl.float32) - (-delta - beta > 0).to(tl.float32)


@triton.jit
def log2_uses(uses, is_own, weight):
    """log2 n_ik for n_k `uses` of centroid k; a sentence's own one counts e^w instead of 1."""
    shift = tl.maximum(weight, 0.0)
    own = (uses - 1.0) * tl.exp2(-shift * LOG2_E) + tl.exp2((weight - shift) * LOG2_E)
    own = tl.where(uses == 1, weight * LOG2_E, tl.log2(own) + shift * LOG2_E)  # e^w alone may underflow
    return tl.where(is_own, own, tl.log2(uses))


@triton.jit
def hard_logits(starts, ids, num_centroids, uses_ptr, own_hard, weight, scale):
    """G_ik and its logit, log2(n_ik · exp(G_ik/τ)), −inf where k is nobody's hard negative; (M, N) each.

    starts (M, 1): where the rows of G begin. ids (1, N). own_hard (M, 1): the hard negative of sentence i.
    """
    cosine = load_row(starts, ids, num_centroids)
    uses = tl.load(uses_ptr + ids, mask=ids < num_centroids, other=0).to(tl.float32)
    logit = cosine * scale + log2_uses(uses, ids == own_hard, weight)
    return cosine, tl.where(uses > 0, logit, float("-inf"))


@triton.jit
def _add(sums, logit, delta):
    """Largest logit of each lane so far, Σ E over it and Σ E (S_ij − s_i), with one more logit in each.

    The largest is the reference of every exponential, so any τ is safe. It is finite: a logit may be −inf.
    """
    largest, total, pull = sums
    reference = tl.maximum(largest, logit)
    keep, weight = tl.exp2(largest - reference), tl.exp2(logit - reference)
    return reference, total * keep + weight, pull * keep + weight * delta


@triton.jit
def _store_row(weight, starts, columns, count, row_mask):
    """Write weights (M, N) where their rows start, 0 into the padding.

    They may lie over the cosines of this block and of those before it, which every thread must have read.
    """
    weight = tl.where(columns < count, weight, 0.0).to(starts.dtype.element_ty)
    tl.debug_barrier()
    tl.store(starts + columns, weight, mask=row_mask[:, None] & (columns < padded(count)))


@triton.jit(do_not_specialize=BATCH_SIZES)
def objective_kernel(
    cosines_ptr,  # (B, padded(B) + N) S, then cosines with the explicit negatives
    centroid_cosines_ptr,  # (B, K) G
    weights_ptr,  # out, at the places of the cosines W; where None they are not asked for
    centroid_weights_ptr,  # out (B, K) likewise, over ‖c_k‖
    x_inverse_ptr,  # (B,) 1/‖a_i‖
    y_inverse_ptr,  # (padded(B) + N,)
    centroid_inverse_ptr,  # (K,)
    cluster_ids_ptr,  # (B,) int: equal ids are false negatives of each other
    hard_ids_ptr,  # (B,) int: whose centroid is sentence j's hard negative
    counters_ptr,  # int32, see `counters`; the arrivals are zero before and after
    nearest_ptr,  # (B,) int64, with HAS_NEAREST
    nearest_cosine_ptr,  # (B,), with HAS_NEAREST
    runner_up_cosine_ptr,  # (B,), with HAS_NEAREST
    x_along_ptr,  # out (B,) Σ_j w_ij S_ij
    y_along_ptr,  # out (row tiles, padded(B) + N), parts of Σ_i w_ij S_ij
    row_terms_ptr,  # scratch (8, B)
    loss_ptr,  # out, 0-dim
    terms_ptr,  # out (8,), see TERMS
    temperature,  # τ, a number or a pointer
    hard_negative_weight,  # w
    bml_weight,  # λ
    alpha,
    beta,
    num_rows,
    num_negatives,
    num_centroids,
    cosines_stride,
    centroid_cosines_stride,
    weights_stride,
    centroid_weights_stride,
    y_along_stride,
    HAS_NEGATIVES: tl.constexpr,
    HAS_HARD_IDS: tl.constexpr,
    HAS_NEAREST: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    FALSE_NEGATIVES: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    WAIT_FOR_STORES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (row tiles,)."""
    wait_for_the_launch_before(DEPENDENT)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    scale = LOG2_E / tau
    alpha, beta = read_scalar(alpha, False), read_scalar(beta, False)
    bml_weight = read_scalar(bml_weight, False)
    hard_negative_weight = read_scalar(hard_negative_weight, False)
    sizes_ptr, uses_ptr, arrivals_ptr, _ = counters(counters_ptr, num_centroids)
    rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1)
    starts = row_starts(cosines_ptr, safe_rows, cosines_stride)  # (M, 1)
    if HAS_HARD_IDS:
        hard_starts = row_starts(centroid_cosines_ptr, safe_rows, centroid_cosines_stride)
        own_hard = tl.load(hard_ids_ptr + safe_rows).to(tl.int32)[:, None]
    if FALSE_NEGATIVES != KEEP:
        own_cluster = tl.load(cluster_ids_ptr + safe_rows)[:, None]
    positive = tl.load(starts + safe_rows[:, None])  # (M, 1) s_i
    negative_starts = starts + padded(num_rows)

    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    parts = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32), zeros, zeros  # the positive is kept apart
    cosine_sum, margin_sum, slope_sum, slope_pull = zeros, zeros, zeros, zeros
    margin_at_zero = tl.maximum(alpha, 0.0) + tl.maximum(-beta, 0.0)  # what every other cell adds
    for start in range(0, num_rows, BLOCK_N):
        columns = (start + tl.arange(0, BLOCK_N))[None, :]
        cosine = load_row(starts, columns, num_rows)
        cosine_sum += cosine
        delta = cosine - positive
        others = (columns < num_rows) & (columns != rows[:, None])
        if FALSE_NEGATIVES != KEEP:
            cluster = tl.load(cluster_ids_ptr + columns, mask=columns < num_rows, other=0)
        if FALSE_NEGATIVES == EXCLUDE:
            others = others & (cluster != own_cluster)
        if FALSE_NEGATIVES == BML:
            mates = others & (cluster == own_cluster)
            slope = tl.where(mates, margin_slope(delta, alpha, beta), 0.0)
            margin = tl.maximum(delta + alpha, 0.0) + tl.maximum(-delta - beta, 0.0)
            margin_sum += tl.where(mates, margin - margin_at_zero, 0.0)
            slope_sum += slope
            slope_pull += slope * delta
        parts = _add(parts, tl.where(others, cosine * scale, float("-inf")), delta)
    if HAS_NEGATIVES:
        for start in range(0, num_negatives, BLOCK_N):
            columns = (start + tl.arange(0, BLOCK_N))[None, :]
            cosine = load_row(negative_starts, columns, num_negatives)
            logit = tl.where(columns < num_negatives, cosine * scale, float("-inf"))
            parts = _add(parts, logit, cosine - positive)
    if HAS_HARD_IDS:
        for start in range(0, num_centroids, BLOCK_N):
            ids = (start + tl.arange(0, BLOCK_N))[None, :]
            cosine, logit = hard_logits(
                hard_starts, ids, num_centroids, uses_ptr, own_hard, hard_negative_weight, scale
            )
            parts = _add(parts, logit, cosine - positive)
    largest, total, pull = parts
    reference = tl.max(largest, axis=1)
    kept = tl.exp2(largest - reference[:, None])
    total, pull = tl.sum(total * kept, axis=1), tl.sum(pull * kept, axis=1)

    # log(1 + Σ_others / E_ii): neither the loss nor its gradient is a difference of near-equals.
    positives = tl.reshape(positive, (BLOCK_M,))
    margin = (tl.log2(total) + reference - positives * scale) * LN_2
    info_nce = tl.maximum(margin, 0.0) + log1p_of_unit(tl.exp2(-tl.abs(margin) * LOG2_E))
    log_total = positives * scale + info_nce * LOG2_E
    pull_sum = pull * tl.exp2(reference - log_total)
    others_share = 1.0 / (1.0 + tl.exp2(-margin * LOG2_E))
    slope_unit = bml_weight * tau / num_rows  # a slope of 1, in units of 1/(Bτ)
    own_weight = -others_share - slope_unit * tl.sum(slope_sum, axis=1)
    along = pull_sum + slope_unit * tl.sum(slope_pull, axis=1)
    if HAS_WEIGHTS:
        tl.store(x_along_ptr + rows, along, mask=row_mask)
        log_total, own_weight = log_total[:, None], own_weight[:, None]
        x_inverse = tl.load(x_inverse_ptr + safe_rows)[:, None]
        weight_starts = row_starts(weights_ptr, safe_rows, weights_stride)
        parts_ptr = y_along_ptr + program.to(tl.int64) * y_along_stride
        for start in range(0, num_rows, BLOCK_N):
            columns = (start + tl.arange(0, BLOCK_N))[None, :]
            cosine = load_row(starts, columns, num_rows)
            weight = tl.exp2(cosine * scale - log_total)
            if FALSE_NEGATIVES != KEEP:
                cluster = tl.load(cluster_ids_ptr + columns, mask=columns < num_rows, other=0)
            if FALSE_NEGATIVES == EXCLUDE:
                weight = tl.where(cluster == own_cluster, 0.0, weight)
            if FALSE_NEGATIVES == BML:
                slope = margin_slope(cosine - positive, alpha, beta) * slope_unit
                weight += tl.where(cluster == own_cluster, slope, 0.0)
            weight = tl.where(columns == rows[:, None], own_weight, weight)
            part = tl.sum(tl.where(row_mask[:, None], weight * cosine, 0.0), axis=0)[None, :]
            tl.store(parts_ptr + columns, part, mask=columns < num_rows)
            norms = x_inverse * load_row(y_inverse_ptr, columns, num_rows)
            _store_row(weight * norms, weight_starts, columns, num_rows, row_mask)
        if HAS_NEGATIVES:
            first = padded(num_rows)
            for start in range(0, num_negatives, BLOCK_N):
                columns = (start + tl.arange(0, BLOCK_N))[None, :]
                cosine = load_row(negative_starts, columns, num_negatives)
                weight = tl.exp2(cosine * scale - log_total)
                part = tl.sum(tl.where(row_mask[:, None], weight * cosine, 0.0), axis=0)[None, :]
                tl.store(parts_ptr + first + columns, part, mask=columns < num_negatives)
                norms = x_inverse * load_row(y_inverse_ptr + first, columns, num_negatives)
                _store_row(weight * norms, weight_starts + first, columns, num_negatives, row_mask)
        if HAS_HARD_IDS:
            weight_starts = row_starts(centroid_weights_ptr, safe_rows, centroid_weights_stride)
            for start in range(0, num_centroids, BLOCK_N):
                ids = (start + tl.arange(0, BLOCK_N))[None, :]
                cosine, logit = hard_logits(
                    hard_starts, ids, num_centroids, uses_ptr, own_hard, hard_negative_weight, scale
                )
                norms = x_inverse * tl.load(centroid_inverse_ptr + ids, mask=ids < num_centroids, other=0.0)
                weight = tl.exp2(logit - log_total) * norms
                _store_row(weight, weight_starts, ids, num_centroids, row_mask)

    # What the means are made of, row by row: as long as `terms`, in its order.
    at = row_terms_ptr + rows
    tl.store(at, info_nce, mask=row_mask)
    tl.store(at + num_rows, tl.sum(margin_sum, axis=1), mask=row_mask)
    tl.store(at + 2 * num_rows, tl.sum(cosine_sum, axis=1), mask=row_mask)
    tl.store(at + 3 * num_rows, positives, mask=row_mask)
    if HAS_NEAREST:
        tl.store(at + 4 * num_rows, tl.load(nearest_cosine_ptr + safe_rows), mask=row_mask)
        tl.store(at + 5 * num_rows, tl.load(runner_up_cosine_ptr + safe_rows), mask=row_mask)
        mates = tl.load(sizes_ptr + tl.load(nearest_ptr + safe_rows)) > 1
        tl.store(at + 6 * num_rows, mates.to(tl.float32), mask=row_mask)
    tl.store(at + 7 * num_rows, pull_sum, mask=row_mask)

    if is_last_to_arrive(arrivals_ptr, num_programs, WAIT_FOR_STORES):
        tl.store(arrivals_ptr, 0)
        term = tl.arange(0, 8)
        written = (term < 8)[:, None]
        if not HAS_NEAREST:
            written = ((term < 4) | (term == 7))[:, None]
        sums = tl.zeros((8, BLOCK_N), tl.float32)
        for start in range(0, num_rows, BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            place = row_terms_ptr + term.to(tl.int64)[:, None] * num_rows + row[None, :]
            mask = written & (row < num_rows)[None, :]
            sums += tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        batch = num_rows.to(tl.float32)
        means = tl.sum(sums, axis=1) / batch  # (8,)
        means = tl.where((term == 1) | (term == 2), means / batch, means)  # over all B² cells
        if FALSE_NEGATIVES == BML:
            means = tl.where(term == 1, means + margin_at_zero, means)
        # ∂loss/∂τ = −1/τ² · mean_i Σ_j (softmax_ij − [i=j]) S_ij; the margin loss does not depend on τ.
        means = tl.where(term == 7, -means / (tau * tau), means)
        tl.store(terms_ptr + term, means)
        share = tl.where(term == 0, 1.0, tl.where(term == 1, bml_weight, 0.0))
        tl.store(loss_ptr, tl.sum(tl.where(share != 0, share * means, 0.0), axis=0))
