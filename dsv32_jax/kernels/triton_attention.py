"""Sparse attention on NVIDIA GPUs in Triton: index scores, top-k selection, and attention over the selected positions.
`gpu_attention` launches these kernels.

Grids are static and lengths are read inside the kernels, so that a decode step stays one CUDA graph. Nothing of the
size heads x keys is written to memory. Cache rows arrive as integers of their bits (`cache_formats`).
"""

import triton
import triton.language as tl


@triton.jit
def index_scores_kernel(q, w, keys, scale, table, position, score, T: tl.constexpr, S: tl.constexpr,
                        HEADS: tl.constexpr, J: tl.constexpr, FP8: tl.constexpr, QUERIES: tl.constexpr,
                        SLOTS: tl.constexpr, PAGE: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Write score[b, t, s] for SLOTS positions and QUERIES queries of a row, -inf behind a query's position. The keys
    are in the row's pages; a position without one is read from the first page."""
    first = tl.program_id(0) * SLOTS
    tiles: tl.constexpr = tl.cdiv(T, QUERIES)
    b = (tl.program_id(1) // tiles).to(tl.int64)
    t_first = tl.program_id(1) % tiles * QUERIES
    s, i, j = first + tl.arange(0, SLOTS), tl.arange(0, HEADS), tl.arange(0, J)
    inside = s < S
    keys = _as_values(keys, FP8)
    page = tl.maximum(tl.load(table + b * BLOCKS + s // PAGE, inside, other=0), 0).to(tl.int64)
    slot = page * PAGE + s % PAGE
    k = tl.load(keys + slot[:, None] * J + j[None, :], inside[:, None], other=0.0)
    if FP8:
        k = (k.to(tl.float32) * tl.load(scale + slot, inside, other=0.0)[:, None]).to(tl.bfloat16)
    for t in range(t_first, tl.minimum(t_first + QUERIES, T)):
        g = b * T + t
        last = tl.load(position + g)
        if first <= last:
            q_t = tl.load(q + (g * HEADS + i)[None, :] * J + j[:, None])
            match = tl.maximum(tl.dot(k, q_t), 0.0, propagate_nan=tl.PropagateNan.ALL)
            total = tl.sum(match * tl.load(w + g * HEADS + i)[None, :], axis=1)
            tl.store(score + g * S + s, tl.where(s <= last, total, float("-inf")), inside)
        else:
            tl.store(score + g * S + s, tl.full((SLOTS,), float("-inf"), tl.float32), inside)


@triton.jit
def _as_values(bits, FP8: tl.constexpr):
    """Cast a pointer to cache rows to one to their values."""
    return bits.to(tl.pointer_type(tl.float8e4nv if FP8 else tl.bfloat16))


@triton.jit
def select_kernel(score, position, candidates, selected, S: tl.constexpr, K: tl.constexpr, SAMPLE: tl.constexpr,
                  SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write selected[g, :K], the positions of the K largest scores of row g in rising order, then -1.

    A row of at most SIZE scores stays in registers. For a longer one, a sample gives a threshold that somewhat more
    than K scores should reach. One pass collects these, and the K largest are found among them. If there are fewer than
    K or more than SIZE, the exact threshold is found with a pass over the whole row for each bit.
    """
    g = tl.program_id(0).to(tl.int64)
    score += g * S
    selected += g * K
    candidates += g * SIZE
    last = tl.minimum(tl.load(position + g) + 1, S)
    n, offset = tl.arange(0, SIZE), tl.arange(0, BLOCK)
    if last <= SIZE:
        key = _keys_at(score, n, n < last)
        _write(selected, n, key, _kth_largest(key, K), K, SIZE)
    else:
        sample = (tl.arange(0, SAMPLE).to(tl.int64) * last // SAMPLE).to(tl.int32)
        mean = K * 1.0 * SAMPLE / last
        rank = (mean + 4 * tl.sqrt(mean) + 8).to(tl.int32)
        least = tl.maximum(_kth_largest(_keys_at(score, sample, sample < last), rank), 1)
        count = tl.zeros((), tl.int32)
        for start in range(0, last, BLOCK):
            s = start + offset
            reaches = (_keys_at(score, s, s < last) >= least).to(tl.int32)
            at = count + tl.cumsum(reaches) - 1
            tl.store(candidates + at, s, (reaches != 0) & (at < SIZE))
            count += tl.sum(reaches)
        tl.debug_barrier()
        if (count >= K) & (count <= SIZE):
            s = tl.load(candidates + n, n < count, other=0)
            key = _keys_at(score, s, n < count)
            _write(selected, s, key, _kth_largest(key, K), K, SIZE)
        else:
            _select_in_passes(score, selected, last, K, BLOCK)


@triton.jit
def _select_in_passes(score, selected, last, K: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    least = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.zeros((), tl.int32)
        for start in range(0, last, BLOCK):
            s = start + offset
            reached += tl.sum((_keys_at(score, s, s < last) >= (least | bit)).to(tl.int32))
        least = tl.where(reached >= K, least | bit, least)
        bit = bit >> 1
    ties = tl.zeros((), tl.int32)
    for start in range(0, last, BLOCK):
        s = start + offset
        ties += tl.sum((_keys_at(score, s, s < last) > least).to(tl.int32))
    count = tl.zeros((), tl.int32)
    for start in range(0, last, BLOCK):
        s = start + offset
        key = _keys_at(score, s, s < last)
        equal = ((key == least) & (key > 0)).to(tl.int32)
        take = ((key > least) | ((equal != 0) & (ties + tl.cumsum(equal) <= K))).to(tl.int32)
        tl.store(selected + count + tl.cumsum(take) - 1, s, take != 0)
        count += tl.sum(take)
        ties += tl.sum(equal)
    _fill(selected, count, K, BLOCK)


@triton.jit
def _write(selected, s, key, least, K: tl.constexpr, SIZE: tl.constexpr):
    """Write the positions s of all keys above `least` and of the first ones that equal it, K in all, then -1."""
    above = (key > least).to(tl.int32)
    equal = ((key == least) & (key > 0)).to(tl.int32)
    take = ((above != 0) | ((equal != 0) & (tl.cumsum(equal) <= K - tl.sum(above)))).to(tl.int32)
    tl.store(selected + tl.cumsum(take) - 1, s, take != 0)
    _fill(selected, tl.sum(take), K, SIZE)


@triton.jit
def _fill(selected, count, K: tl.constexpr, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    for start in range(0, K, SIZE):
        tl.store(selected + start + n, tl.full((SIZE,), -1, tl.int32), (start + n >= count) & (start + n < K))


@triton.jit
def _kth_largest(key, k):
    """Return the k-th largest of these uint32 keys, found bit by bit, or 0 if there are fewer."""
    found = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((key >= (found | bit)).to(tl.int32))
        found = tl.where(reached >= k, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit
def _keys_at(score, s, inside):
    """Return the scores at positions s as uint32 of the same order, at least 1, and 0 for -inf and outside. NaN is the
    largest, and both zeros are equal."""
    x = tl.load(score + s, inside, other=float("-inf"))
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(x != x, tl.full(x.shape, 0xFFFFFFFF, tl.uint32), key)
    return tl.where(x == float("-inf"), 0, key)


@triton.jit
def sparse_attention_kernel(q_c, q_r, slot, position, latent, latent_scale, rotated, out, norm,
                            SOFTMAX_SCALE: tl.constexpr, G: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                            C: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, EACH: tl.constexpr,
                            HEADS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Write out[part, g, h, :], float32: HEADS heads of query g over EACH of its slots, in the latents' space; and
    norm[part, g, h], the base 2 logarithm of the sum of their weights, which combines the parts."""
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    g = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    c, r = tl.arange(0, C), tl.arange(0, R)
    in_h = (h < H)[:, None]
    latent, rotated = _as_values(latent, FP8), _as_values(rotated, False)
    q_c_h = tl.load(q_c + (g * H + h)[:, None] * C + c[None, :], in_h, other=0.0)
    q_r_h = tl.load(q_r + (g * H + h)[:, None] * R + r[None, :], in_h, other=0.0)
    most = tl.full((HEADS,), -1e30, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, C), tl.float32)
    end = tl.minimum(tl.minimum((part + 1) * EACH, K), tl.load(position + g) + 1)
    for start in range(part * EACH, end, SLOTS):
        n = start + tl.arange(0, SLOTS)
        at = tl.load(slot + g * K + n, n < end, other=-1)
        there = at >= 0
        row = tl.where(there, at, 0).to(tl.int64)
        k = tl.load(latent + row[:, None] * C + c[None, :])
        if FP8:
            tiles: tl.constexpr = C // 128
            step = tl.load(latent_scale + row[:, None] * tiles + tl.arange(0, tiles)[None, :])
            step = tl.broadcast_to(step[:, :, None], (SLOTS, tiles, 128)).reshape(SLOTS, C)
            k = (k.to(tl.float32) * step).to(tl.bfloat16)
        x = tl.dot(q_c_h, tl.trans(k))
        x = tl.dot(q_r_h, tl.trans(tl.load(rotated + row[:, None] * R + r[None, :])), x) * SOFTMAX_SCALE
        x = tl.where(there[None, :], x, float("-inf"))
        more = tl.maximum(most, tl.max(x, axis=1))
        fade, weight = tl.exp2(most - more), tl.exp2(x - more[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(tl.bfloat16), k, acc * fade[:, None])
        most = more
    some = total != 0
    total = tl.where(some, total, 1.0)
    where = (part * G + g) * H + h
    tl.store(out + where[:, None] * C + c[None, :], acc / total[:, None], in_h)
    tl.store(norm + where, tl.where(some, most + tl.log2(total), float("-inf")), h < H)
