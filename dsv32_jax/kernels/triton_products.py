"""Products with quantized weights on NVIDIA GPUs, in the Triton language; `gpu_products` launches them.

A program multiplies a tile of one weight with a tile of a block of x. The weight is the left operand of the tensor
cores and is dequantized in the registers it was loaded to; its bytes stay as they are stored. What would have to be
interleaved is the order of x instead, which is small and rearranged before. A weight costs 3.8 instructions in this
way, so that a few rows are multiplied at the speed of memory.

Products are exact in float32. The tensor cores truncate their sums (an error of 1e-5 over k = 7168), so the sum of a
step is added to the others outside of them. Only tiles of 256 rows do without, since they fill the registers.
"""

import triton
import triton.language as tl


@triton.jit
def nvfp4_kernel(x, expert, codes, scale, y, N: tl.constexpr, B: tl.constexpr, OUTPUTS: tl.constexpr,
                 MATRICES: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr, STEPS: tl.constexpr,
                 OUT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """y[part, n, b, o] over this part of k. x is in planes; a column is a word of 8 codes, WIDTH make a row.

    A step has two products, of the low and of the high codes of the words.
    """
    n, b, o, row, first, last = _place(expert, B, OUTPUTS, MATRICES, WIDTH, STEPS, OUT, COLUMNS, ROWS)
    block: tl.constexpr = WIDTH // SCALES
    scales: tl.constexpr = COLUMNS // block
    column, s, k = tl.arange(0, COLUMNS)[None, :], tl.arange(0, scales)[None, :], tl.arange(0, 4 * COLUMNS)[:, None]
    word_p = codes.to(tl.pointer_type(tl.int32)) + row * WIDTH + column
    scale_p = scale + row * SCALES + s
    x_p = x + (n * B + b)[None, :] * (tl.cdiv(WIDTH, COLUMNS) * 8 * COLUMNS) + k
    in_b = None if B % ROWS == 0 else (b < B)[None, :]
    whole: tl.constexpr = WIDTH % COLUMNS == 0
    acc = tl.zeros((OUT, ROWS), tl.float32)
    for t in range(first, last):
        e = _elements(tl.load(word_p + t * COLUMNS, None if whole else t * COLUMNS + column < WIDTH))
        step = tl.load(scale_p + t * scales, None if whole else t * scales + s < SCALES)
        step = (tl.minimum(step.to(tl.float32), 448.0) * 2.0**118).to(tl.bfloat16)
        step = tl.broadcast_to(step[:, :, None], (OUT, scales, block)).reshape(OUT, COLUMNS)
        low = _side_by_side(e[0] * step, e[1] * step, e[2] * step, e[3] * step)
        high = _side_by_side(e[4] * step, e[5] * step, e[6] * step, e[7] * step)
        product = acc if ROWS == 256 else tl.zeros_like(acc)
        product = tl.dot(low, tl.load(x_p + t * 8 * COLUMNS, in_b), product)
        product = tl.dot(high, tl.load(x_p + (t * 8 + 4) * COLUMNS, in_b), product)
        acc = product if ROWS == 256 else _plus(acc, product)
    _store(y, acc * 2.0**8, n, b, o, N, B, OUTPUTS)


@triton.jit
def fp8_kernel(x, expert, values, scale, y, N: tl.constexpr, B: tl.constexpr, OUTPUTS: tl.constexpr,
               MATRICES: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr, STEPS: tl.constexpr,
               OUT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """y[part, n, b, o] over this part of k. A column is a value; those of a step, at most 128, share a scale."""
    n, b, o, row, first, last = _place(expert, B, OUTPUTS, MATRICES, WIDTH, STEPS, OUT, COLUMNS, ROWS)
    column, k = tl.arange(0, COLUMNS)[None, :], tl.arange(0, COLUMNS)[:, None]
    value_p = values + row * WIDTH + column
    x_p = x + (n * B + b)[None, :] * WIDTH + k
    in_b = None if B % ROWS == 0 else (b < B)[None, :]
    whole: tl.constexpr = WIDTH % COLUMNS == 0
    acc = tl.zeros((OUT, ROWS), tl.float32)
    for t in range(first, last):
        value = tl.load(value_p + t * COLUMNS, None if whole else t * COLUMNS + column < WIDTH)
        step = tl.load(scale + row * SCALES + t * COLUMNS // 128)
        w = (value.to(tl.float32) * step).to(tl.bfloat16)
        x_tile = tl.load(x_p + t * COLUMNS, in_b if whole else (t * COLUMNS + k < WIDTH) & (b < B)[None, :])
        acc = tl.dot(w, x_tile, acc) if ROWS == 256 else _plus(acc, tl.dot(w, x_tile))
    _store(y, acc, n, b, o, N, B, OUTPUTS)


@triton.jit
def _place(expert, B: tl.constexpr, OUTPUTS: tl.constexpr, MATRICES: tl.constexpr, WIDTH: tl.constexpr,
           STEPS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """This program's block n, rows b, outputs o, rows of the bank, and steps from first to last: none of no matrix."""
    n = tl.program_id(1).to(tl.int64)
    matrix = tl.load(expert + n).to(tl.int64)
    row_tiles: tl.constexpr = tl.cdiv(B, ROWS)
    b = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) // row_tiles * OUT + tl.arange(0, OUT)
    row = matrix * OUTPUTS + (o if OUTPUTS % OUT == 0 else tl.minimum(o, OUTPUTS - 1))
    first = tl.program_id(2) * STEPS
    last = tl.minimum(first + STEPS, tl.cdiv(WIDTH, COLUMNS))
    return n, b, o, row[:, None], first, tl.where((matrix >= 0) & (matrix < MATRICES), last, first)


@triton.jit
def _store(y, acc, n, b, o, N: tl.constexpr, B: tl.constexpr, OUTPUTS: tl.constexpr):
    block = tl.program_id(2) * N + n
    tl.store(y + (block * B + b)[None, :] * OUTPUTS + o[:, None], acc, (b < B)[None, :] & (o < OUTPUTS)[:, None])


@triton.jit
def _plus(acc, product):
    """Their sum. A plain one would be moved into the tensor cores."""
    return tl.fma(product, 1.0, acc)


@triton.jit
def _side_by_side(w0, w1, w2, w3):
    """Four arrays as one, which moves nothing between threads."""
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).permute(0, 2, 3, 1)
    return w.reshape(w0.shape[0], 4 * w0.shape[1])


@triton.jit
def _elements(words):
    """The 8 elements of each word times 2^-126, in bfloat16: exponent and mantissa of E2M1 go where bfloat16 has the
    lowest bits of its exponent and the highest of its mantissa. Two words at once, since two elements fill a register.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, s, m;
        prmt.b32 a, $8, $9, 0x5410;
        prmt.b32 b, $8, $9, 0x7632;
        shl.b32 m, a, 6;  and.b32 m, m, 0x01C001C0;  shl.b32 s, a, 12;  lop3.b32 $0, s, 0x80008000, m, 0xEA;
        shl.b32 m, a, 2;  and.b32 m, m, 0x01C001C0;  shl.b32 s, a, 8;   lop3.b32 $1, s, 0x80008000, m, 0xEA;
        shr.b32 m, a, 2;  and.b32 m, m, 0x01C001C0;  shl.b32 s, a, 4;   lop3.b32 $2, s, 0x80008000, m, 0xEA;
        shr.b32 m, a, 6;  and.b32 m, m, 0x01C001C0;                     lop3.b32 $3, a, 0x80008000, m, 0xEA;
        shl.b32 m, b, 6;  and.b32 m, m, 0x01C001C0;  shl.b32 s, b, 12;  lop3.b32 $4, s, 0x80008000, m, 0xEA;
        shl.b32 m, b, 2;  and.b32 m, m, 0x01C001C0;  shl.b32 s, b, 8;   lop3.b32 $5, s, 0x80008000, m, 0xEA;
        shr.b32 m, b, 2;  and.b32 m, m, 0x01C001C0;  shl.b32 s, b, 4;   lop3.b32 $6, s, 0x80008000, m, 0xEA;
        shr.b32 m, b, 6;  and.b32 m, m, 0x01C001C0;                     lop3.b32 $7, b, 0x80008000, m, 0xEA;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )
