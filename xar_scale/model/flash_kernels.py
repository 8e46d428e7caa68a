"""The Triton kernels of flash_attention: forward, and backward to the queries and to the keys and values.

Head widths need not be powers of two: a head is split into two tiles, the largest power of two and the rest, so 80 channels are
64 and 16 instead of 128. Rows beyond the last one are clamped to it, read but never written, so loads of rows need no mask.
"""

from typing import Any

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
    from triton.language import constexpr
except ImportError:  # CPU wheels of PyTorch come without Triton
    triton, constexpr = None, Any


def _jit(kernel: Any) -> Any:
    return triton.jit(kernel) if triton else kernel


@_jit
def _load(x, rows, stride, H: constexpr, MAIN: constexpr, REST: constexpr):  # type: ignore[no-untyped-def]
    """Load rows of x: their first MAIN channels, and the REST after them, which are 0 from H on."""
    main = tl.load(x + rows[:, None] * stride + tl.arange(0, MAIN)[None, :])
    rest = main
    if REST:
        channels = MAIN + tl.arange(0, REST)[None, :]
        rest = tl.load(x + rows[:, None] * stride + channels, mask=channels < H, other=0.0)
    return main, rest


@_jit
def _store(x, rows, stride, real, main, rest, H: constexpr, MAIN: constexpr, REST: constexpr):  # type: ignore[no-untyped-def]
    """Store what _load loads, for the real rows only."""
    dtype = x.dtype.element_ty
    tl.store(x + rows[:, None] * stride + tl.arange(0, MAIN)[None, :], main.to(dtype), mask=real[:, None])
    if REST:
        channels = MAIN + tl.arange(0, REST)[None, :]
        tl.store(x + rows[:, None] * stride + channels, rest.to(dtype), mask=real[:, None] & (channels < H))


@_jit
def _products(a, a_rest, b, b_rest, REST: constexpr):  # type: ignore[no-untyped-def]
    """Dot products of each row of a with each row of b."""
    products = tl.dot(a, tl.trans(b))
    if REST:
        products = tl.dot(a_rest, tl.trans(b_rest), products)
    return products


@_jit
def _mixed(x):  # type: ignore[no-untyped-def]
    """MurmurHash3's 32-bit finaliser without its last step, x ^ (x >> 16), which changes the lower half only."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    return (x ^ (x >> 13)) * 0xC2B2AE35


@_jit
def _words(places, seed):  # type: ignore[no-untyped-def]
    """A random word per query of a head of a sample: two rounds of the finaliser, each after xor with a word of the seed."""
    x = _mixed(places.to(tl.uint32) ^ tl.load(seed).to(tl.uint32))
    x = _mixed(x ^ (x >> 16) ^ tl.load(seed + 1).to(tl.uint32))
    return x ^ (x >> 16)


@_jit
def _kept(words, keys, dropped):  # type: ignore[no-untyped-def]
    """Which probabilities dropout keeps: a third round, of the query's word times an odd number for the key.

    This takes more of a kernel's time than anything else. With all rounds here, over a counter of probabilities, it would take
    twice as long.
    """
    return _mixed(words * (2 * keys + 1).to(tl.uint32)).to(tl.int32, bitcast=True) >= dropped


# fmt: off
@_jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, ends, seed, out, lse,
    q_b, q_n, q_t, k_b, k_n, k_t, v_b, v_n, v_t,
    N, Tq, Tk, scale, dropped, grown,
    H: constexpr, MAIN: constexpr, REST: constexpr,
    QUERIES: constexpr, KEYS: constexpr, DROPOUT: constexpr,
):
    # fmt: on
    """Compute the output, and log2 of the sum of exponentials, of a block of queries."""
    blocks = tl.cdiv(Tq, QUERIES)
    head = tl.program_id(0) // blocks  # counted over all samples
    begin = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # longest blocks first
    b, n = (head // N).to(tl.int64), (head % N).to(tl.int64)
    q += b * q_b + n * q_n
    k += b * k_b + n * k_n
    v += b * v_b + n * v_n
    out += (b * Tq * N + n) * H
    lse += head.to(tl.int64) * Tq

    real = begin + tl.arange(0, QUERIES) < Tq
    rows = tl.minimum(begin + tl.arange(0, QUERIES), Tq - 1)
    end = tl.load(ends + rows)
    by_all = tl.load(ends + begin) // KEYS * KEYS  # keys that all queries attend to, in whole blocks
    by_any = tl.load(ends + tl.minimum(begin + QUERIES, Tq) - 1)
    if DROPOUT:
        drawn = _words(head * Tq + rows, seed)

    q_main, q_rest = _load(q, rows, q_t, H, MAIN, REST)
    log2_scale = scale * 1.4426950408889634
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    rest = tl.zeros([QUERIES, REST], tl.float32) if REST else main
    for PARTLY in tl.static_range(2):  # keys of all of the queries, then of some
        for start in range(by_all if PARTLY else 0, by_any if PARTLY else by_all, KEYS):
            keys = start + tl.arange(0, KEYS)
            there = tl.minimum(keys, Tk - 1) if PARTLY else keys
            k_main, k_rest = _load(k, there, k_t, H, MAIN, REST)
            scores = _products(q_main, q_rest, k_main, k_rest, REST)
            if PARTLY:
                scores = tl.where(keys[None, :] < end[:, None], scores, float("-inf"))
            # never a maximum of -inf only: key 0 is in the first block, and all queries attend to it
            higher = tl.maximum(peak, tl.max(scores, 1) * log2_scale)
            p = tl.exp2(scores * log2_scale - higher[:, None])
            shrink = tl.exp2(peak - higher)
            peak = higher
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                # a product, not tl.where: the compiler makes that a selection of 16-bit halves, which takes more instructions
                p *= _kept(drawn[:, None], keys[None, :], dropped).to(tl.float32)
            v_main, v_rest = _load(v, there, v_t, H, MAIN, REST)
            p = p.to(v_main.dtype)
            main = tl.dot(p, v_main, main * shrink[:, None])
            if REST:
                rest = tl.dot(p, v_rest, rest * shrink[:, None])

    share = (grown / total)[:, None]
    _store(out, rows, N * H, real, main * share, rest * share, H, MAIN, REST)
    tl.store(lse + rows, peak + tl.log2(total), mask=real)


# fmt: off
@_jit
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, ends, seed, grad, out, lse, delta, words, dq,
    q_b, q_n, q_t, k_b, k_n, k_t, v_b, v_n, v_t, grad_b, grad_n, grad_t, out_b, out_n, out_t,
    N, Tq, Tk, scale, dropped, grown,
    H: constexpr, MAIN: constexpr, REST: constexpr,
    QUERIES: constexpr, KEYS: constexpr, DROPOUT: constexpr,
):
    # fmt: on
    """Compute the gradients of a block of queries, and delta = rowsum(dO * O), as FlashAttention-2 names it.

    Dropout scales up what it keeps: that factor is taken out of the loops, and out of delta.
    """
    blocks = tl.cdiv(Tq, QUERIES)
    head = tl.program_id(0) // blocks
    begin = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    b, n = (head // N).to(tl.int64), (head % N).to(tl.int64)
    q += b * q_b + n * q_n
    k += b * k_b + n * k_n
    v += b * v_b + n * v_n
    grad += b * grad_b + n * grad_n
    out += b * out_b + n * out_n
    dq += (b * Tq * N + n) * H
    lse += head.to(tl.int64) * Tq
    delta += head.to(tl.int64) * Tq

    real = begin + tl.arange(0, QUERIES) < Tq
    rows = tl.minimum(begin + tl.arange(0, QUERIES), Tq - 1)
    end = tl.load(ends + rows)
    by_all = tl.load(ends + begin) // KEYS * KEYS
    by_any = tl.load(ends + tl.minimum(begin + QUERIES, Tq) - 1)
    if DROPOUT:
        drawn = _words(head * Tq + rows, seed)
        tl.store(words + head.to(tl.int64) * Tq + rows, drawn.to(tl.int32), mask=real)

    q_main, q_rest = _load(q, rows, q_t, H, MAIN, REST)
    grad_main, grad_rest = _load(grad, rows, grad_t, H, MAIN, REST)
    out_main, out_rest = _load(out, rows, out_t, H, MAIN, REST)
    mean = tl.sum(grad_main.to(tl.float32) * out_main.to(tl.float32), 1)
    if REST:
        mean += tl.sum(grad_rest.to(tl.float32) * out_rest.to(tl.float32), 1)
    mean = mean / grown
    tl.store(delta + rows, mean, mask=real)
    logs = tl.load(lse + rows)
    log2_scale = scale * 1.4426950408889634
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    rest = tl.zeros([QUERIES, REST], tl.float32) if REST else main
    for PARTLY in tl.static_range(2):
        for start in range(by_all if PARTLY else 0, by_any if PARTLY else by_all, KEYS):
            keys = start + tl.arange(0, KEYS)
            there = tl.minimum(keys, Tk - 1) if PARTLY else keys
            k_main, k_rest = _load(k, there, k_t, H, MAIN, REST)
            v_main, v_rest = _load(v, there, v_t, H, MAIN, REST)
            scores = _products(q_main, q_rest, k_main, k_rest, REST)
            p = tl.exp2(scores * log2_scale - logs[:, None])
            if PARTLY:
                p = tl.where(keys[None, :] < end[:, None], p, 0.0)
            dp = _products(grad_main, grad_rest, v_main, v_rest, REST)
            if DROPOUT:
                dp = tl.where(_kept(drawn[:, None], keys[None, :], dropped), dp, 0.0)
            ds = (p * (dp - mean[:, None])).to(k_main.dtype)
            main = tl.dot(ds, k_main, main)
            if REST:
                rest = tl.dot(ds, k_rest, rest)

    _store(dq, rows, N * H, real, main * (scale * grown), rest * (scale * grown), H, MAIN, REST)


# fmt: off
@_jit
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, ends, grad, lse, delta, words, dk, dv,
    q_b, q_n, q_t, k_b, k_n, k_t, v_b, v_n, v_t, grad_b, grad_n, grad_t,
    N, Tq, Tk, scale, dropped, grown,
    H: constexpr, MAIN: constexpr, REST: constexpr,
    QUERIES: constexpr, KEYS: constexpr, DROPOUT: constexpr,
):
    # fmt: on
    """Compute the gradients of a block of keys and values. Scores are (keys, queries) here, as the products need them."""
    blocks = tl.cdiv(Tk, KEYS)
    head = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * KEYS  # the first blocks have most queries
    b, n = (head // N).to(tl.int64), (head % N).to(tl.int64)
    q += b * q_b + n * q_n
    k += b * k_b + n * k_n
    v += b * v_b + n * v_n
    grad += b * grad_b + n * grad_n
    dk += (b * Tk * N + n) * H
    dv += (b * Tk * N + n) * H
    lse += head.to(tl.int64) * Tq
    delta += head.to(tl.int64) * Tq
    words += head.to(tl.int64) * Tq

    keys = begin + tl.arange(0, KEYS)
    there = tl.minimum(keys, Tk - 1)
    k_main, k_rest = _load(k, there, k_t, H, MAIN, REST)
    v_main, v_rest = _load(v, there, v_t, H, MAIN, REST)
    none = 0  # blocks of queries that attend to none of the keys
    while (none * QUERIES < Tq) & (tl.load(ends + tl.minimum(none * QUERIES + QUERIES, Tq) - 1) <= begin):
        none += 1
    some = none  # plus those that do not attend to all
    while (some * QUERIES < Tq) & (tl.load(ends + tl.minimum(some * QUERIES, Tq - 1)) < tl.minimum(begin + KEYS, Tk)):
        some += 1

    log2_scale = scale * 1.4426950408889634
    dk_main = tl.zeros([KEYS, MAIN], tl.float32)
    dv_main = tl.zeros([KEYS, MAIN], tl.float32)
    dk_rest = tl.zeros([KEYS, REST], tl.float32) if REST else dk_main
    dv_rest = tl.zeros([KEYS, REST], tl.float32) if REST else dv_main
    for PARTLY in tl.static_range(2):
        for start in range((none if PARTLY else some) * QUERIES, some * QUERIES if PARTLY else Tq, QUERIES):
            queries = start + tl.arange(0, QUERIES)
            rows = tl.minimum(queries, Tq - 1)
            q_main, q_rest = _load(q, rows, q_t, H, MAIN, REST)
            grad_main, grad_rest = _load(grad, rows, grad_t, H, MAIN, REST)
            # inf: beyond the last query the probability is 0
            logs = tl.load(lse + rows, mask=queries < Tq, other=float("inf"))
            mean = tl.load(delta + rows)
            scores = _products(k_main, k_rest, q_main, q_rest, REST)
            p = tl.exp2(scores * log2_scale - logs[None, :])
            if PARTLY:
                p = tl.where(keys[:, None] < tl.load(ends + rows)[None, :], p, 0.0)
            dp = _products(v_main, v_rest, grad_main, grad_rest, REST)
            kept_p = p
            if DROPOUT:
                kept = _kept(tl.load(words + rows).to(tl.uint32)[None, :], keys[:, None], dropped)
                kept_p = tl.where(kept, p, 0.0)
            ds = (kept_p * dp - p * mean[None, :]).to(q_main.dtype)
            kept_p = kept_p.to(q_main.dtype)
            dv_main = tl.dot(kept_p, grad_main, dv_main)
            dk_main = tl.dot(ds, q_main, dk_main)
            if REST:
                dv_rest = tl.dot(kept_p, grad_rest, dv_rest)
                dk_rest = tl.dot(ds, q_rest, dk_rest)

    real = keys < Tk
    _store(dk, there, N * H, real, dk_main * (scale * grown), dk_rest * (scale * grown), H, MAIN, REST)
    _store(dv, there, N * H, real, dv_main * grown, dv_rest * grown, H, MAIN, REST)


KERNELS = {"forward": _forward, "queries": _backward_queries, "keys": _backward_keys}
