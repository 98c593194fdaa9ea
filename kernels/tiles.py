"""Device code that several kernels share: products, norms, the two best, the order of arrival.

Shapes in comments: M, N rows and columns of a tile, D a block of the embedding dimension. Everything that
is summed is float32, and so is every logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Finite, so that a row without any logit gives exp2(−inf) = 0 and not inf − inf.
LOWEST = tl.constexpr(-3.0e38)
# `clusterns.reference.SHORTEST_NORM`: a shorter vector has no direction.
SHORTEST_NORM = tl.constexpr(1e-8)

# What happens to false negatives: the values of the constexpr FALSE_NEGATIVES.
KEEP = tl.constexpr(0)
EXCLUDE = tl.constexpr(1)
BML = tl.constexpr(2)


@triton.jit
def wait_for_the_launch_before(DEPENDENT: tl.constexpr):
    """First of all in a kernel: the next one may start, this one waits for what it is to read.

    With programmatic dependent launch (sm_90 and later) launches overlap by their ends and beginnings.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _dot(x, y, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def _three_terms(z):
    """Float32 as a sum of three bfloat16, to 24 bits."""
    high = z.to(tl.bfloat16)
    rest = z - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply_add(x, y, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator (M, N) + x (M, D) · y (D, N), in float32 sums.

    Float32 beside bfloat16 is multiplied in three terms, exactly, and with no change of the other factor.
    UPCAST widens half operands first: the interpreter multiplies bfloat16 wrongly. On a GPU it is False.
    """
    if x.dtype == y.dtype:
        accumulator = _dot(x, y, accumulator, PRECISION, UPCAST)
    elif y.dtype == tl.bfloat16:
        high, middle, low = _three_terms(x)
        accumulator = _dot(low, y, accumulator, PRECISION, UPCAST)
        accumulator = _dot(middle, y, accumulator, PRECISION, UPCAST)
        accumulator = _dot(high, y, accumulator, PRECISION, UPCAST)
    elif x.dtype == tl.bfloat16:
        high, middle, low = _three_terms(y)
        accumulator = _dot(x, low, accumulator, PRECISION, UPCAST)
        accumulator = _dot(x, middle, accumulator, PRECISION, UPCAST)
        accumulator = _dot(x, high, accumulator, PRECISION, UPCAST)
    else:
        accumulator = _dot(x.to(tl.float32), y.to(tl.float32), accumulator, PRECISION, UPCAST)
    return accumulator


@triton.jit
def inverse_norm(square):
    """1/‖z‖ from ‖z‖²; 0 for a row without direction, NaN for NaN, 0 for an infinite norm."""
    norm = tl.sqrt_rn(square)
    return tl.where(norm <= SHORTEST_NORM, 0.0, tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm))


@triton.jit
def read_scalar(value, IS_POINTER: tl.constexpr):
    """A number of the host, or a 0-dim tensor on the device, as float32."""
    if IS_POINTER:
        number = tl.load(value).to(tl.float32)
    else:
        number = tl.zeros((), tl.float32) + value  # the interpreter passes a Python float
    return number


@triton.jit
def row_starts(ptr, rows, stride):
    """Where rows (M,) of a matrix start, (M, 1), in 64 bits."""
    return ptr + rows.to(tl.int64)[:, None] * stride


@triton.jit
def product_tile(
    x_rows,  # (M, 1) where rows start, already within bounds
    y_rows,  # (N, 1) likewise
    dim,
    X_NORMS: tl.constexpr,
    Y_NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x_i·y_j (M, N) and in the same sweep 1/‖x_i‖ (M,) and 1/‖y_j‖ (N,), each where it is asked for.

    The raw rows are multiplied, for the norms to be divided out of the sum, so half precision loses nothing:
    its products are exact in float32.
    """
    products = tl.zeros((x_rows.shape[0], y_rows.shape[0]), tl.float32)
    x_square = tl.zeros((x_rows.shape[0],), tl.float32)
    y_square = tl.zeros((y_rows.shape[0],), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < dim)[None, :]
        x = tl.load(x_rows + d[None, :], mask=inside, other=0.0)  # (M, D)
        y = tl.load(y_rows + d[None, :], mask=inside, other=0.0)  # (N, D)
        if X_NORMS:
            x_wide = x.to(tl.float32)
            x_square += tl.sum(x_wide * x_wide, axis=1)
        if Y_NORMS:
            y_wide = y.to(tl.float32)
            y_square += tl.sum(y_wide * y_wide, axis=1)
        products = multiply_add(x, tl.trans(y), products, PRECISION, UPCAST)
    return products, inverse_norm(x_square), inverse_norm(y_square)


@triton.jit
def two_best(scores, ids, num_ids):
    """Largest and second-largest score of each row with their ids; the lowest id of equals.

    scores (M, N), ids (N,) ascending. Columns with an id ≥ num_ids cannot win, whatever the sign of the
    others; nor can NaN, which a maximum passes over. Where nothing is left to win, the score is −inf or NaN
    and the id of no use: a comparison with ">" never takes it.
    """
    at = ids[None, :]
    scores = tl.where(at < num_ids, scores, float("-inf"))
    score_1 = tl.max(scores, axis=1)  # (M,)
    # With `return_indices` every step of the reduction would carry both along.
    id_1 = tl.min(tl.where(scores == score_1[:, None], at, 2147483647), axis=1)
    scores = tl.where(at == id_1[:, None], float("-inf"), scores)
    score_2 = tl.max(scores, axis=1)
    id_2 = tl.min(tl.where(scores == score_2[:, None], at, 2147483647), axis=1)
    return score_1, id_1, score_2, id_2


@triton.jit
def better_two(score_1, id_1, score_2, id_2, new_1, new_id_1, new_2, new_id_2):
    """Two best of two pairs, of which the second one's ids are the higher: the lowest id of equals."""
    wins = new_1 > score_1
    # The runner-up is the loser of the two firsts, or the winner's own second. On a tie the lower id stands.
    loser, loser_id = tl.where(wins, score_1, new_1), tl.where(wins, id_1, new_id_1)
    own, own_id = tl.where(wins, new_2, score_2), tl.where(wins, new_id_2, id_2)
    takes_loser = (loser > own) | (wins & (loser == own))
    score_1, id_1 = tl.where(wins, new_1, score_1), tl.where(wins, new_id_1, id_1)
    return score_1, id_1, tl.where(takes_loser, loser, own), tl.where(takes_loser, loser_id, own_id)


@triton.jit
def is_last_to_arrive(counter_ptr, expected, WAIT_FOR_STORES: tl.constexpr):
    """Whether `expected` − 1 other programs have passed here, and what they wrote before can be read.

    The counter must start at 0. Results stay the same from run to run as long as the last one reads the
    others' results in a fixed order, with `.cg` loads that bypass its own first-level cache.

    On AMD's gfx9 a barrier does not wait for the stores of other waves, and the atomic that follows waits for
    its own wave's alone: WAIT_FOR_STORES makes every wave wait for its own.
    """
    if WAIT_FOR_STORES:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
            "=v,v",
            [tl.arange(0, 256)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()  # every thread has written before one of them says so
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == expected - 1


@triton.jit
def padded(count):
    """Round up to a multiple of 16, as `launch.padded`: what starts there is aligned."""
    return tl.cdiv(count, 16) * 16


@triton.jit
def load_row(ptr, columns, count):
    """Numbers of a row of `count` that starts at a multiple of 16 and is padded to one; 0 beyond `count`.

    Reading into the padding keeps the mask in step with 16-byte accesses; what lies there is not used.
    """
    values = tl.load(ptr + columns, mask=columns < padded(count), other=0.0)
    return tl.where(columns < count, values, 0.0)


@triton.jit
def counters(counters_ptr, num_centroids):
    """Places in the one buffer of integer counters, all zero before the first launch that counts.

    Sizes (K,): points whose nearest centroid is k. Uses (K,): points whose runner-up is k. Arrivals at the
    objective (1,), at each row tile of the assignment (row tiles,).
    """
    step = padded(num_centroids)
    uses_ptr = counters_ptr + step
    return counters_ptr, uses_ptr, uses_ptr + step, uses_ptr + step + 16
