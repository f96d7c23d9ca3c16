"""Kernels: each is its reference within float32 rounding, whatever the shape, the bytes and the experts."""

import logging
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dsv32_jax as ds
from dsv32_jax.cli import demo
from dsv32_jax.errors import DsvError, UsageError
from dsv32_jax.kernels import VARIABLE, cpu, dispatch, reference, triton_launch
from dsv32_jax.model import experts, mla, ops
from dsv32_jax.quantization import cache_formats, quantize
from dsv32_jax.quantization.formats import NVFP4, Fp8Block, dequantize
from dsv32_jax.system import compilation, host

compiled = pytest.mark.skipif(bool(cpu.find_obstacle()), reason=cpu.find_obstacle())
toolchain = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
FORMATS = ("nvfp4", "fp8", "bf16")
TOLERANCE = 1e-6
"""Of the largest |x| . |w| of a row: a product of float32 has no smaller error in any order of summation."""

shapes = st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 70), st.integers(1, 12), st.integers(1, 3))
few = settings(max_examples=8)
"""Every shape is a program."""


def bank(kind: str, rng, many: int, out: int, size: int):
    """A bank [many, out, size] of all bytes that a format can hold, but for FP8's NaN."""
    if kind == "nvfp4":
        codes = rng.integers(0, 256, (many, out, size // 2), np.uint8)
        scales = rng.integers(0, 256, (many, out, size // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
        return NVFP4(jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(rng.random((many, 1, 1), np.float32)))
    if kind == "fp8":
        values = rng.integers(0, 256, (many, out, size), np.uint8)
        values[values & 127 == 127] = 0
        scales = rng.choice([rng.random(), 0.5, 2.0**-9], (many, out, -(-size // 128))).astype(np.float32)
        return Fp8Block(jnp.asarray(values.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scales))
    return jnp.asarray(rng.standard_normal((many, out, size)), jnp.bfloat16)


def plain(w) -> np.ndarray:
    """The bank, dequantized on the host."""
    match w:
        case NVFP4():
            return quantize.nvfp4_dequantize(*map(np.asarray, (w.codes, w.block_scale, w.tensor_scale)))
        case Fp8Block():
            return quantize.fp8_dequantize(np.asarray(w.values), np.asarray(w.block_scale))
        case _:
            return np.asarray(w, np.float32)


def exact(x, expert, w) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and that of magnitudes."""
    x, values = np.asarray(x, np.float64), plain(w).astype(np.float64)
    of = [values[e] if 0 <= e < len(values) else 0 * values[0] for e in np.asarray(expert)]
    pairs = list(zip(x, of, strict=True))
    return np.stack([a @ b.T for a, b in pairs]), np.stack([abs(a) @ abs(b).T for a, b in pairs])


def close(got, x, expert, w) -> None:
    want, size = exact(x, expert, w)
    assert np.all(np.abs(np.asarray(got) - want) <= TOLERANCE * size.max(axis=-1, keepdims=True) + 1e-30)


@compiled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@few
@given(shape=shapes, seed=st.integers(0, 99))
def test_blocks(kind, dtype, shape, seed):
    """Any number of blocks, rows, outputs and inputs; ids that are no expert, below and above, make zeros."""
    many, rows, out, size, count = shape
    rng = np.random.default_rng(seed)
    w = bank(kind, rng, many, out, 16 * size)
    x = jnp.asarray(rng.standard_normal((count, rows, 16 * size)), dtype)
    expert = jnp.asarray(rng.integers(-1, many + 1, count), jnp.int32)
    close(dispatch._apply_tensor_scale(cpu.multiply_blocks)(x, expert, w), x, expert, w)


@compiled
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rows", "out", "size"), [(1, 130, 7168), (9, 33, 2048), (16, 65, 1536), (3, 40, 18432)])
def test_true_sizes(kind, rows, out, size):
    """Contractions that go in pieces."""
    rng = np.random.default_rng(rows)
    w = bank(kind, rng, 2, out, size)
    x = jnp.asarray(rng.standard_normal((2, rows, size)), jnp.bfloat16)
    expert = jnp.asarray([1, 0], jnp.int32)
    close(dispatch.multiply_blocks(x, expert, w), x, expert, w)
    close(reference.multiply_blocks(x, expert, w), x, expert, w)


@compiled
def test_every_byte():
    """All 256 scales of NVFP4, a NaN standing for 448, with all codes; all values of FP8, NaN staying NaN."""
    codes = jnp.tile(jnp.asarray([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], jnp.uint8), (1, 256, 1))
    scales = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8).reshape(1, 256, 1), jnp.float8_e4m3fn)
    one = jnp.zeros(1, jnp.int32)
    w = NVFP4(codes, scales, jnp.ones((1, 1, 1)))
    each = jnp.eye(16, dtype=jnp.float32)[None]
    np.testing.assert_array_equal(cpu.multiply_blocks(each, one, w)[0].T, dequantize(w, jnp.float32)[0])
    values = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8).reshape(2, 128), jnp.float8_e4m3fn)
    for scale in (1.0, 0.37):
        w = Fp8Block(values[None], jnp.full((1, 2, 1), scale))
        each = jnp.eye(128, dtype=jnp.float32)[None]
        got, want = np.asarray(cpu.multiply_blocks(each, one, w)[0].T), np.asarray(dequantize(w, jnp.float32)[0])
        np.testing.assert_array_equal(np.isnan(got).any(axis=1), np.isnan(want).any(axis=1))
        numbers = ~np.isnan(want).any(axis=1)
        np.testing.assert_array_equal(got[numbers], want[numbers])


@compiled
@pytest.mark.parametrize(("width", "size"), [(32, 192), (32, 18432), (64, 7168), (112, 7168)])
def test_wider_scales(width, size):
    """More than 16 inputs that share a scale, also where pieces begin in the middle of them."""
    rng = np.random.default_rng(0)
    w = bank("nvfp4", rng, 2, 9, size)
    w = NVFP4(w.codes, w.block_scale[..., : size // width], w.tensor_scale)
    expert = jnp.asarray([1, 0], jnp.int32)
    assert dispatch.find_kernels(w, 1)
    for rows in (1, 3, 8):
        x = jnp.asarray(rng.standard_normal((2, rows, size)), jnp.bfloat16)
        close(dispatch.multiply_blocks(x, expert, w), x, expert, w)


@compiled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@few
@given(shape=shapes, seed=st.integers(0, 99))
def test_columns(dtype, shape, seed):
    """Weights that lie the other way."""
    many, rows, out, size, _ = shape
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((many, size, out)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((many, rows, size)), dtype)
    close(cpu.multiply_columns(x, w), x, range(many), jnp.swapaxes(w, 1, 2))


@compiled
@pytest.mark.parametrize(
    ("spec", "left", "right"),
    [
        ("BTD,QD->BTQ", (2, 3, 96), (40, 96)),
        ("BTHP,DHP->BTD", (2, 3, 4, 128), (24, 4, 128)),
        ("BTQ,HNQ->BTHN", (2, 3, 128), (4, 24, 128)),
        ("BTHC,HPC->BTHP", (2, 3, 4, 32), (4, 24, 32)),
        ("BTHN,HNC->BTHC", (2, 3, 4, 24), (4, 24, 32)),
    ],
)
def test_einsum(monkeypatch, spec, left, right):
    """Every form in which the model multiplies by a weight, with kernels and without."""
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.standard_normal(left), jnp.bfloat16), jnp.asarray(rng.standard_normal(right), jnp.bfloat16)
    got = ops.einsum32(spec, x, w)
    monkeypatch.setenv(VARIABLE, "xla")
    want = ops.einsum32(spec, x, w)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


CACHES = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn)


def attention_operands(rng, dtype, stored, shape):
    """Queries, pools of pages of 4 slots, slots with holes and tails of -1 but not without any, positions."""
    batch, tokens, heads, latent, rotated, count = shape
    q_c, q_r = (jnp.asarray(rng.standard_normal((batch, tokens, heads, size)), dtype) for size in (latent, rotated))
    other = jnp.bfloat16 if stored == jnp.float8_e4m3fn else stored
    pools = [
        cache_formats.encode_like(
            cache_formats.empty((1, 1, size), kind), jnp.asarray(rng.standard_normal((50, 4, size)), jnp.float32)
        )
        for size, kind in ((latent, stored), (rotated, other))
    ]
    slots = rng.permuted(np.tile(np.arange(200, dtype=np.int32), (batch, tokens, 1)), axis=-1)[..., :count]
    hidden = (np.arange(count) >= rng.integers(1, count + 1, (batch, tokens, 1))) | (rng.random(slots.shape) < 0.1)
    hidden[..., 0] = False
    position = jnp.full((batch, tokens), 199, jnp.int32)
    return q_c, q_r, *pools, jnp.asarray(np.where(hidden, -1, slots)), position


def attend_both(operands) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel and what the reference makes of them."""
    return tuple(np.asarray(jax.jit(partial(f, 0.3))(*operands)) for f in (cpu.attend, mla.attend_selected))


@compiled
@pytest.mark.parametrize("stored", CACHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@few
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 3, 9, 140, 17, 150))),
    seed=st.integers(0, 99),
)
def test_sparse_attention(dtype, stored, shape, seed):
    """Any number of rows, queries, heads, elements and slots, in every storage, equals the reference: but for the last
    bit of weights that are bfloat16."""
    got, want = attend_both(attention_operands(np.random.default_rng(seed), dtype, stored, shape))
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


@compiled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_sparse_attention_of_special_values(dtype):
    """NaN and infinities reach the result as in the reference, no slot at all gives NaN, and equal scores share."""
    rng = np.random.default_rng(0)
    q_c, q_r, latent, rotated, slot, position = attention_operands(rng, dtype, jnp.float32, (1, 5, 4, 16, 8, 70))
    latent = latent.at[0, 0, 3].set(jnp.nan).at[0, 1, 2].set(jnp.inf).at[0, 2, 2].set(-jnp.inf)
    slot = np.where(np.asarray(slot) < 4, 60, slot)
    slot[0, 0, 1], slot[0, 1, 1], slot[0, 2, 1], slot[0, 3] = 0, 1, 2, -1
    slot[0, 4] = 77
    got, want = attend_both((q_c, q_r, latent, rotated, jnp.asarray(slot), position))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got[0, 3]).all() and not np.isnan(got[0, 4]).any()
    np.testing.assert_allclose(got[0, 4], want[0, 4], atol=1e-5 if dtype == jnp.float32 else 2.0**-7)


@compiled
@few
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 3, 300, 80))),
    kind=st.sampled_from(["any", "ties", "special", "hidden"]),
    seed=st.integers(0, 99),
)
def test_selection(shape, kind, seed):
    """The set of the reference, for any sizes and positions: ties, both zeros, NaN, infinities, all hidden."""
    batch, tokens, slots, topk = shape
    rng = np.random.default_rng(seed)
    score = rng.standard_normal((batch, tokens, slots)).astype(np.float32)
    if kind == "ties":
        score = np.where(score > 1, 1, score.round() * rng.choice([0.0, 1.0], score.shape)).astype(np.float32)
    if kind == "special":
        score = np.where(rng.random(score.shape) < 0.3, rng.choice([np.nan, np.inf, -np.inf], score.shape), score)
    score = np.full_like(score, -np.inf) if kind == "hidden" else score.astype(np.float32)
    position = rng.integers(0, slots, (batch, tokens), np.int32)
    position[0, 0] = slots - 1
    score = jnp.where(np.arange(slots) <= position[..., None], score, -jnp.inf)
    got = np.asarray(jax.jit(partial(cpu.select_topk, topk=min(topk, slots)))(score, position))
    np.testing.assert_array_equal(np.sort(got), np.sort(reference.select_topk(score, topk)))
    count = (got >= 0).sum(axis=-1, keepdims=True)
    assert ((np.diff(got) > 0) | (np.arange(1, got.shape[-1]) >= count)).all()


@compiled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_a_query_is_alone(dtype):
    """Bit for bit what it is in any company."""
    q_c, q_r, latent, rotated, slot, position = attention_operands(
        np.random.default_rng(1), dtype, jnp.bfloat16, (2, 3, 40, 64, 16, 130)
    )
    together = np.asarray(cpu.attend(0.3, q_c, q_r, latent, rotated, slot, position))
    alone = cpu.attend(0.3, q_c[1:, 1:2], q_r[1:, 1:2], latent, rotated, slot[1:, 1:2], position[1:, 1:2])
    np.testing.assert_array_equal(alone, together[1:, 1:2])


@compiled
@pytest.mark.parametrize("kind", FORMATS)
def test_derivatives_are_those_of_the_reference(kind):
    """With respect to activations, through blocks of experts."""
    rng = np.random.default_rng(2)
    w = bank(kind, rng, 3, 8, 128)
    x, expert = jnp.asarray(rng.standard_normal((4, 2, 128)), jnp.float32), jnp.asarray([0, 3, 2, 1], jnp.int32)
    got, want = (
        jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x, expert, w) * 1e-3)))(x)
        for f in (dispatch.multiply_blocks, reference.multiply_blocks)
    )
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_the_environment_chooses(monkeypatch):
    """ "xla" takes the reference, whatever is there; another word is refused."""
    w = bank("nvfp4", np.random.default_rng(0), 1, 4, 32)
    monkeypatch.setenv(VARIABLE, "xla")
    assert dispatch.find_kernels(w, 1) == {}
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match="DSV32_KERNELS must be one of auto, xla, not 'fast'"):
        dispatch.find_kernels(w, 1)
    with pytest.raises(UsageError, match="nothing was run"):
        ds.load("nowhere")
    with pytest.raises(UsageError, match="nothing was run"):
        demo.run(SimpleNamespace(json=False, max_tokens=1, keep=None))


def test_without_kernels(monkeypatch, caplog):
    """An installation without a compiler computes the same, and says once that it is slow."""
    rng = np.random.default_rng(3)
    w = bank("nvfp4", rng, 2, 5, 48)
    x, expert = jnp.asarray(rng.standard_normal((3, 2, 48)), jnp.float32), jnp.asarray([1, 2, 0], jnp.int32)
    monkeypatch.setattr(cpu, "find_obstacle", lambda: "it was built without a compiler")
    dispatch._warn_slow.cache_clear()
    with caplog.at_level(logging.WARNING, "dsv32_jax"):
        close(dispatch.multiply_blocks(x, expert, w), x, expert, w)
        close(dispatch.multiply_blocks(x, expert, w), x, expert, w)
    assert [record.getMessage() for record in caplog.records] == [
        "products with stored weights are slow without kernels: it was built without a compiler"
    ]


@compiled
def test_nothing_is_dequantized():
    """What a product of experts needs beside its arguments has nothing of the size of a matrix."""
    w = bank("nvfp4", np.random.default_rng(0), 4, 256, 512)
    down = bank("nvfp4", np.random.default_rng(1), 4, 512, 256)
    h, chosen, gate = jnp.ones((1, 512), jnp.bfloat16), jnp.asarray([[2, 0]], jnp.int32), jnp.ones((1, 2), jnp.float32)
    program = jax.jit(experts.apply_experts).lower(h, chosen, gate, w, w, down).compile()
    assert program.memory_analysis().temp_size_in_bytes < 256 * 512


@toolchain
def test_without_vector_instructions(tmp_path):
    """The plain C++ that other processors run gives what the vectors do."""
    folder, library = Path(cpu.__file__).with_name("src"), tmp_path / "portable.so"
    source = "".join(f'#include "{name}.cc"\n' for name in ("attention", "dot", "host"))
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", "-DDSV32_PORTABLE", "-isystem", jax.ffi.include_dir()]
    subprocess.run([*command, f"-I{folder}", "-xc++", "-", "-o", str(library)], check=True, input=source, text=True)
    script = f"""
import numpy as np, jax.numpy as jnp
from pathlib import Path
from dsv32_jax.kernels import cpu, dispatch
cpu.find_library = lambda: Path({str(library)!r})
assert not cpu.find_obstacle()
from tests import test_kernels as tests
for kind in tests.FORMATS:
    for dtype in (jnp.float32, jnp.bfloat16):
        rng = np.random.default_rng(7)
        w = tests.bank(kind, rng, 2, 37, 16 * 21)
        x, expert = jnp.asarray(rng.standard_normal((3, 11, 16 * 21)), dtype), jnp.asarray([1, 2, 0], jnp.int32)
        tests.close(dispatch._apply_tensor_scale(cpu.multiply_blocks)(x, expert, w), x, expert, w)
for stored in tests.CACHES:
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2.0**-8)):
        operands = tests.attention_operands(np.random.default_rng(0), dtype, stored, (2, 2, 5, 70, 9, 80))
        got, want = tests.attend_both(operands)
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@toolchain
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(pytestconfig, tmp_path, sanitizer):
    """Nothing is read or written outside of arrays, nothing is undefined, no thread races another."""
    if not pytestconfig.getoption("--sanitizers"):
        pytest.skip("--sanitizers compiles and runs this")
    source, program = Path(__file__).with_name("kernels_sanitized.cc"), tmp_path / "program"
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("limits", "size"), [((8, 256), 8), ((1, 1), 1), ((1, 2), 2)])
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_blocks_of_other_sizes(monkeypatch, tokens, limits, size):
    """Where a kernel multiplies eight rows in the time of one, blocks have room for as many, and where it collects rows
    itself, they have one; the sums are the same."""
    rng = np.random.default_rng(tokens)
    w = jnp.asarray(rng.standard_normal((8, 6, 16), np.float32))
    down = jnp.asarray(rng.standard_normal((8, 16, 6), np.float32))
    h = jnp.asarray(rng.standard_normal((tokens, 16), np.float32))
    chosen = jnp.asarray(np.argsort(rng.random((tokens, 9)))[:, :3].astype(np.int32))
    gates = jnp.asarray(rng.random((tokens, 3), np.float32))
    want = experts.apply_experts(h, chosen, gates, w, w, down)
    monkeypatch.setattr(dispatch, "limit_block", lambda *banks: limits)
    assert experts.assign_blocks(chosen, 8, *limits).token_nb.shape[1] == (1 if tokens * 3 <= 8 else size)
    np.testing.assert_allclose(
        experts.apply_experts(h, chosen, gates, w, w, down), want, atol=1e-5 * float(jnp.abs(want).max())
    )


@compiled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_is_alone(kind, dtype):
    """Bit for bit what it is in any company, so that drafts and batches change no token."""
    rng = np.random.default_rng(4)
    w = bank(kind, rng, 1, 33, 7168)
    x, one = jnp.asarray(rng.standard_normal((1, 15, 7168)), dtype), jnp.zeros(1, jnp.int32)
    together = np.asarray(dispatch.multiply_blocks(x, one, w))
    for first, last in ((0, 1), (3, 5), (2, 9), (14, 15)):
        np.testing.assert_array_equal(dispatch.multiply_blocks(x[:, first:last], one, w), together[:, first:last])


def test_a_launch_tells_jaxlib_what_jax_triton_does(monkeypatch):
    """A call that graphs can hold carries the bytes of jax_triton's call; a kernel is compiled once for each shape."""
    told, traced = b"\x78\x9c\x00 \xff", []

    def triton_call(*operands, kernel, out_shape, grid, **constants):
        traced.append((kernel, grid, constants))
        time.sleep(0.2)
        old = {"custom_call_api_version": 2, "legacy_backend_config": told}
        return jax.ffi.ffi_call("triton_kernel_call", out_shape, **old)(*operands)

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=triton_call))
    triton_launch._compile.cache_clear()
    out, x = jax.ShapeDtypeStruct((4, 5), np.float32), np.zeros((4, 3), np.float32)

    def twice(x):
        return [triton_launch.launch("kernel", out, x, grid=(1, 2, 3), WIDTH=7) for _ in range(2)]

    start = time.perf_counter()
    with compilation.count_compilations() as meter:
        text = jax.jit(twice).lower(x).as_text()
    assert 0.2 < meter.seconds < time.perf_counter() - start
    assert text.count(f"@{triton_launch.TARGET}") == text.count('opaque = "x\\9C\\00 \\FF"') == 2
    assert traced == [("kernel", (1, 2, 3), {"WIDTH": 7})]
    triton_launch._compile.cache_clear()


@pytest.mark.parametrize("calls", [0, 2])
def test_a_program_of_jax_triton_without_its_kernel_is_refused(monkeypatch, calls):
    """Another version of jax_triton may call it in another way: the error says so and what to do."""

    def triton_call(*operands, kernel, out_shape, grid, **constants):
        call = jax.ffi.ffi_call("triton_kernel_call", out_shape)
        return sum((call(*operands) for _ in range(calls)), jnp.zeros(out_shape.shape))

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=triton_call))
    monkeypatch.setattr(triton_launch.importlib.metadata, "version", lambda name: "1.2.3")
    triton_launch._compile.cache_clear()
    out, x = jax.ShapeDtypeStruct((4, 5), np.float32), np.zeros((4, 3), np.float32)
    with pytest.raises(DsvError, match=f"{calls} custom calls.*jax-triton 1.2.3 do not work.*{VARIABLE}=xla"):
        jax.jit(lambda x: triton_launch.launch("kernel", out, x, grid=(1, 2, 3))).lower(x)


PRODUCTS = (
    "BTHN,BSHN->BTHS BTHS,BSHP->BTHP BTHC,BSC->BTHS BTHS,BSC->BTHC BTkC,BTHC->BTkH BTHk,BTkC->BTHC BTiJ,BSJ->BTiS "
    "BSC,HNC->BSHN BTD,FD->BTF BTHN,HNC->BTHC BTHC,HPC->BTHP nbz,nzo->nbo bz,oz->bo"
).split()


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("spec", PRODUCTS)
def test_products_of_bfloat16_are_those_of_float32(spec, instructions, monkeypatch):
    """With instructions for them and without, of few rows and many: products are exact, and added in float32."""
    monkeypatch.setattr(host, "has_avx512_bf16", lambda: instructions)
    left, right, out = spec.replace("->", ",").split(",")
    rng = np.random.default_rng(sum(map(ord, spec)))
    for sizes in ((1, 2, 3, 5), (2, 16, 24), (33, 64)):
        size = {letter: int(rng.choice(sizes)) for letter in left + right}
        a, b = (jnp.asarray(rng.normal(size=[size[x] for x in letters]), jnp.bfloat16) for letters in (left, right))
        got = jax.jit(lambda a, b: reference.dot(spec, a, b))(a, b)
        want = np.einsum(spec, np.asarray(a, np.float64), np.asarray(b, np.float64))
        assert got.dtype == jnp.float32 and np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
