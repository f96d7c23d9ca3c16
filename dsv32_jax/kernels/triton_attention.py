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
    t_last = tl.minimum(t_first + QUERIES, T)
    each = t_first + tl.arange(0, triton.next_power_of_2(QUERIES))
    seen = first <= tl.max(tl.load(position + b * T + each, each < t_last, other=-1))
    k = _load_keys(keys, scale, table + b * BLOCKS, s, (s < S) & seen, J, FP8, PAGE)
    for t in range(t_first, t_last):
        g = b * T + t
        last = tl.load(position + g)
        if first <= last:
            q_t = tl.load(q + (g * HEADS + i)[None, :] * J + j[:, None])
            _store_scores(k, q_t, tl.load(w + g * HEADS + i), score + g * S, s, last, S)
        else:
            tl.store(score + g * S + s, tl.full((SLOTS,), float("-inf"), tl.float32), s < S)


@triton.jit
def index_scores_of_one_kernel(q, w, keys, scale, table, position, score, S: tl.constexpr, HEADS: tl.constexpr,
                               J: tl.constexpr, FP8: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr,
                               PAGE: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Write score[b, s] for TILES x SLOTS positions and the only query of a row: keys stream through shared memory."""
    first = tl.program_id(0) * (SLOTS * TILES)
    b = tl.program_id(1).to(tl.int64)
    i, j, n = tl.arange(0, HEADS), tl.arange(0, J), tl.arange(0, SLOTS)
    last = tl.load(position + b)
    q_t = tl.load(q + (b * HEADS + i)[None, :] * J + j[:, None])
    w_i = tl.load(w + b * HEADS + i)
    end = tl.minimum(first + SLOTS * TILES, S)
    seen = tl.minimum(end, last + 1)
    for start in range(first, seen, SLOTS):
        s = start + n
        k = _load_keys(keys, scale, table + b * BLOCKS, s, s < S, J, FP8, PAGE)
        _store_scores(k, q_t, w_i, score + b * S, s, last, S)
    for start in range(first + tl.cdiv(tl.maximum(seen - first, 0), SLOTS) * SLOTS, end, SLOTS):
        tl.store(score + b * S + start + n, tl.full((SLOTS,), float("-inf"), tl.float32), start + n < S)


@triton.jit
def _load_keys(keys, scale, table, s, inside, J: tl.constexpr, FP8: tl.constexpr, PAGE: tl.constexpr):
    """Return the index keys of a row at positions s, bfloat16 [s, J]."""
    page = tl.maximum(tl.load(table + s // PAGE, inside, other=0), 0).to(tl.int64)
    slot = page * PAGE + s % PAGE
    k = tl.load(_as_values(keys, FP8) + slot[:, None] * J + tl.arange(0, J)[None, :], inside[:, None], other=0.0)
    if FP8:
        k = (k.to(tl.float32) * tl.load(scale + slot, inside, other=0.0)[:, None]).to(tl.bfloat16)
    return k


@triton.jit
def _store_scores(k, q_t, w, score, s, last, S: tl.constexpr):
    match = tl.maximum(tl.dot(k, q_t), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(score + s, tl.where(s <= last, tl.sum(match * w[None, :], axis=1), float("-inf")), s < S)


@triton.jit
def _as_values(bits, FP8: tl.constexpr):
    """Cast a pointer to cache rows to one to their values."""
    return bits.to(tl.pointer_type(tl.float8e4nv if FP8 else tl.bfloat16))


@triton.jit
def collect_kernel(score, position, candidates, count, S: tl.constexpr, K: tl.constexpr, SAMPLE: tl.constexpr,
                   SIZE: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr,
                   ROOM: tl.constexpr):  # fmt: skip
    """Write candidates[g, part, :ROOM], positions of this part of row g that may have one of the K largest scores, and
    their count[g, part], which may be larger. A sample of the row gives a threshold that somewhat more than K scores
    should reach. A row of at most SIZE scores has no candidates."""
    g = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    score += g * S
    candidates += (g * PARTS + part) * ROOM
    last = tl.minimum(tl.load(position + g) + 1, S)
    found = tl.zeros((), tl.int32)
    if last > SIZE:
        sample = (tl.arange(0, SAMPLE).to(tl.int64) * last // SAMPLE).to(tl.int32)
        mean = K * 1.0 * SAMPLE / last
        rank = (mean + 4 * tl.sqrt(mean) + 8).to(tl.int32)
        least = tl.maximum(_kth_largest(_keys_at(score, sample, sample < last), rank), 1)
        for start in range(part * EACH, tl.minimum((part + 1) * EACH, last), BLOCK):
            s = start + tl.arange(0, BLOCK)
            reaches = (_keys_at(score, s, s < last) >= least).to(tl.int32)
            at = found + tl.cumsum(reaches) - 1
            tl.store(candidates + at, s, (reaches != 0) & (at < ROOM))
            found += tl.sum(reaches)
    tl.store(count + g * PARTS + part, found)


@triton.jit
def select_kernel(score, position, candidates, count, before, selected, S: tl.constexpr, K: tl.constexpr,
                  SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr):  # fmt: skip
    """Write selected[g, :K], the positions of the K largest scores of row g in rising order, then -1; before[g, :] is
    the number of candidates before each part.

    The scores of a short row, or those of the candidates, stay in registers. If there are fewer than K candidates or
    more than SIZE, the exact threshold is found with a pass over the whole row for each bit.
    """
    g = tl.program_id(0).to(tl.int64)
    score += g * S
    selected += g * K
    last = tl.minimum(tl.load(position + g) + 1, S)
    n = tl.arange(0, SIZE)
    if last <= SIZE:
        _write(selected, n, _keys_at(score, n, n < last), K, SIZE)
    else:
        parts: tl.constexpr = max(2, triton.next_power_of_2(PARTS))
        p = tl.arange(0, parts)
        each = tl.load(count + g * PARTS + p, p < PARTS, other=0)
        total = tl.sum(each)
        tl.store(before + g * parts + p, tl.cumsum(each) - each)
        tl.debug_barrier()
        if (total >= K) & (total <= SIZE):
            part = tl.zeros((SIZE,), tl.int32)
            step = tl.full((), parts // 2, tl.int32)
            while step > 0:
                part = tl.where(tl.load(before + g * parts + part + step) <= n, part + step, part)
                step = step // 2
            at = n - tl.load(before + g * parts + part)
            s = tl.load(candidates + (g * PARTS + part) * ROOM + at, n < total, other=0)
            _write(selected, s, _keys_at(score, s, n < total), K, SIZE)
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
def _write(selected, s, key, K: tl.constexpr, SIZE: tl.constexpr):
    """Write the positions s of the K largest keys, of equal ones the first, then -1."""
    least = tl.zeros((), tl.uint32)
    if tl.sum((key > 0).to(tl.int32)) > K:
        least = _kth_largest(key, K)
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
    """Return a number that at least k of these uint32 keys reach and at most k exceed, found bit by bit, or 0 if there
    are fewer."""
    found = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    while bit > 0:
        reached = tl.sum((key >= (found | bit)).to(tl.int32))
        found = tl.where(reached >= k, found | bit, found)
        found = tl.where(reached == k, found - 1, found)
        bit = tl.where(reached == k, 0, bit >> 1)
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
    """Write out[part, g, h, :]: HEADS heads of query g over EACH of its slots, in the latents' space; and
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
    tl.store(out + where[:, None] * C + c[None, :], (acc / total[:, None]).to(out.dtype.element_ty), in_h)
    tl.store(norm + where, tl.where(some, most + tl.log2(total), float("-inf")), h < H)
