"""The proof by planted mistakes: every typical mistake turns the suite red.

    python -m tests.mutations [NAME ...] [--jobs N]

Each mistake of the golden sets' tables is planted in a copy of the source tree by exact replacement of text, and the
cheapest tests that should see it are run on the copy. Ends with 1 where a mistake stays unseen, where a replacement no
longer applies, or where the tests are not green to begin with.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
SECONDS = 300
"""How long one run may take before it counts as broken."""


VERDICTS = {0: "UNSEEN", 1: "CRASHED"}
"""What an exit code of pytest says where no assertion failed: a mistake that only breaks the program proves nothing."""


class Edit(NamedTuple):
    """One replacement: `old` occurs exactly once in `file`."""

    file: str
    old: str
    new: str


class Mistake(NamedTuple):
    """A mistake, how to plant it, and the tests that must see it."""

    name: str
    tests: tuple[str, ...]
    edits: tuple[Edit, ...]


def mistake(name: str, tests: str, file: str, *texts: str, also: tuple[Edit, ...] = ()) -> Mistake:
    """A Mistake whose edits of `file` are given as old, new, old, new, ..."""
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Mistake(name, tuple(tests.split()), tuple(Edit(file, old, new) for old, new in pairs) + also)


OPS, INDEXER, ATTENTION, MLA = (f"dsv32_jax/model/{name}.py" for name in ("ops", "indexer", "attention", "mla"))
EXPERTS, MOE, MODEL = (f"dsv32_jax/model/{name}.py" for name in ("experts", "moe", "model"))
LAYOUT, REFERENCE = "dsv32_jax/layout.py", "dsv32_jax/kernels/reference.py"
FORMATS, CHECKPOINT = "dsv32_jax/quantization/formats.py", "dsv32_jax/checkpoint/load.py"
WEIGHTS = "convert/read/weights.py"

UNITS, GOLDEN = "tests/test_units.py::test_", "tests/test_golden.py::test_"
GATE, YARN, BYTES = UNITS + "gate", UNITS + "yarn_table_of_the_paper", UNITS + "every_byte"
MODELOPT = UNITS + "dequantizer_of_modelopt"
SPARSE, INDEX = f"{GOLDEN}prefill[p4_fp8_realheaddims]", f"{GOLDEN}indexer[p4_fp8_realheaddims]"
MTP = f"{GOLDEN}mtp[p2_noyarn_mtp_latesparse]"
V2, V3, V5 = (
    f"{GOLDEN}every_matrix_is_what_the_checkpoint_stores[{case}]"
    for case in ("v2_modelopt_mlp_oproj_mtp", "v3_ct_nvfp4a16", "v5_fp8_source")
)

HALVES = """    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
"""
PAIRS = """    first, second = (x[..., i : 2 * half : 2].astype(jnp.float32) for i in (0, 1))
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    turned = turned.reshape(*x.shape[:-1], 2 * half)
"""
JOINED = "jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)"
RAMP = "stretched = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)"
GROUPS = "jax.lax.top_k(biased_BTGe, 2)[0].sum(axis=-1)"
SHARE = "chosen_BTX / (jnp.sum(chosen_BTX, axis=-1, keepdims=True) + 1e-20) * cfg.routed_scaling_factor"
NORM_OF_STREAM = "return rms_norm(x_BTD, self.norm_D, self.cfg.rms_norm_eps).astype(self.dtype)"

BITCAST = "jax.lax.bitcast_convert_type(w.codes, jnp.float4_e2m1fn)"
LOOKUP = "_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)\n\n\n"
NIBBLES = "jnp.stack([w.codes & 15, w.codes >> 4], axis=-1)"
SCALE = "scale = w.block_scale.astype(jnp.float32)\n"
NO_NAN = "    scale = jnp.where(jnp.isnan(scale), E4M3_MAX, scale)\n"
GLOBAL = "return _blocks(w) * w.tensor_scale"
BLOCKED = "(blocks.astype(jnp.float32) * scale[..., None]).reshape(w.shape)"
FP8 = "w.values.astype(jnp.float32) * step"
BUILD = "    return build(stored.cfg, dtype, lambda path:"
ROWS = "np.repeat(scale, FP8_BLOCK, axis=0)[:out]"
READ = "        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)\n"
SCALAR = "value = read(stored.tensor_scale).astype(np.float32).reshape(1)"


def merged(*groups: str) -> str:
    """Text that gives all NVFP4 leaves of a group, which are named by their endings, the largest of their scales."""
    return f"""    import dataclasses as _d
    for group in {[group.split() for group in groups]}:
        for path in [p for p in found if p.endswith(group[0]) and hasattr(found[p], "tensor_scale")]:
            paths = [path[: -len(group[0])] + ending for ending in group]
            largest = found[path].tensor_scale
            for other in paths[1:]:
                largest = jnp.maximum(largest, found[other].tensor_scale)
            found |= {{p: _d.replace(found[p], tensor_scale=largest) for p in paths}}
"""


MISTAKES = (
    # the model
    mistake("idx_interleaved", f"{UNITS}rope {INDEX}", OPS, HALVES, PAIRS),
    mistake(
        "mla_neox", SPARSE, MLA,
        "q_r_BTHR = rotate_interleaved(", "q_r_BTHR = rotate_halves(",
        "k_r_BTR = rotate_interleaved(", "k_r_BTR = rotate_halves(",
        "einsum32, rms_norm, rotate_interleaved", "einsum32, rms_norm, rotate_halves",
    ),
    mistake("no_mscale", f"{UNITS}softmax_scale", MLA, "return scale * (0.1", "return scale + 0 * (0.1"),
    mistake("mscale_once", f"{UNITS}softmax_scale", MLA, "log(yarn.factor) + 1) ** 2", "log(yarn.factor) + 1)"),
    mistake("yarn_off", YARN, OPS, "    if yarn is None:\n", "    if True:\n"),
    mistake("yarn_all_interp", YARN, OPS, RAMP, "stretched = np.ones(size // 2, np.float32)"),
    mistake("yarn_ramp_flipped", YARN, OPS, RAMP, RAMP.replace("= np", "= 1 - np")),
    mistake(
        "q_pe_first", SPARSE, LAYOUT,
        '"H(N|R),Q", "mla.w_uq_HNQ mla.w_qr_HRQ"', '"H(R|N),Q", "mla.w_qr_HRQ mla.w_uq_HNQ"',
    ),
    mistake(
        "idx_q_unnormed", SPARSE, ATTENTION,
        "indexer.queries(c_q_BTQ,", 'indexer.queries(einsum("BTD,QD->BTQ", h_BTD, mla.w_dq_QD),',
        "from .ops import map_tokens", "from .ops import einsum, map_tokens",
    ),
    mistake(
        "idx_rope_last", f"{UNITS}rotate_halves_passes_the_rest_through", OPS,
        "    half = cos.shape[-1]\n", "    half = cos.shape[-1]\n    x = jnp.roll(x, 2 * half, axis=-1)\n",
        f"return {JOINED}", f"return jnp.roll({JOINED}, -2 * half, axis=-1)",
    ),
    mistake("knorm_rms", INDEX, OPS, "centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)", "centred = x32"),
    mistake("knorm_nobias", INDEX, OPS, "normed + bias.astype(jnp.float32)", "normed"),
    mistake("no_relu", f"{UNITS}indexer_scores", REFERENCE, "match_BTiS = jax.nn.relu(", "match_BTiS = ("),
    mistake(
        "relu_after_weight", f"{UNITS}indexer_scores", REFERENCE,
        "match_BTiS = jax.nn.relu(", "match_BTiS = (",
        'dot("BTi,BTiS->BTS", w_BTi, match_BTiS)', "jax.nn.relu(w_BTi[..., None] * match_BTiS).sum(axis=2)",
    ),
    mistake(
        "idx_no_weights", f"{UNITS}indexer_scores", REFERENCE,
        'dot("BTi,BTiS->BTS", w_BTi, match_BTiS)', "match_BTiS.sum(axis=2)",
    ),
    mistake("topk_minus1", f"{UNITS}indexer_scores", REFERENCE, "min(topk, score", "min(topk - 1, score"),
    mistake("dense", SPARSE, ATTENTION, "if cache.capacity > cfg.index_topk:", "if False:"),
    mistake("group_top1", GATE, MOE, GROUPS, GROUPS.replace("sum", "max")),
    mistake("no_bias", GATE, MOE, "affinity_BTE + bias_E.astype(jnp.float32)", "affinity_BTE + 0 * bias_E"),
    mistake("no_group", GATE, MOE, "jnp.where(eligible_BTE, biased_BTE, -jnp.inf)", "biased_BTE"),
    mistake("bias_in_weight", GATE, MOE, "take_along_axis(affinity_BTE,", "take_along_axis(biased_BTE,"),
    mistake("no_renorm", GATE, MOE, SHARE, "chosen_BTX * cfg.routed_scaling_factor"),
    mistake("no_rsf", GATE, MOE, SHARE, SHARE.removesuffix(" * cfg.routed_scaling_factor")),
    mistake(
        "shared_scaled", f"{GOLDEN}prefill[p2_noyarn_mtp_latesparse]", EXPERTS,
        "*routed) + apply_shared_expert(h_tD, *shared)", "*routed) + 2.5 * apply_shared_expert(h_tD, *shared)",
    ),
    mistake(
        "mtp_prenorm_hidden", MTP, MODEL,
        NORM_OF_STREAM, "return x_BTD.astype(self.dtype)",
        'return einsum32("BTD,VD->BTV", h_BTD, self.head_VD)',
        'return einsum32("BTD,VD->BTV", rms_norm(h_BTD, self.norm_D, self.cfg.rms_norm_eps), self.head_VD)',
    ),
    mistake("mtp_eh_order", MTP, LAYOUT, '"w_e_AD w_h_AD"', '"w_h_AD w_e_AD"'),
    # the formats
    mistake("nibble_swap", BYTES, FORMATS, BITCAST, BITCAST + "[..., ::-1]"),
    mistake(
        "halves_of_block", BYTES, FORMATS,
        BITCAST, f"{NIBBLES.replace('w.codes', 'w.codes.reshape(*w.block_scale.shape, -1)')}.swapaxes(-1, -2)",
        "(blocks.astype(jnp.float32)", "(jnp.asarray(_E2M1)[blocks]",
        "@jax.jit\ndef _blocks", LOOKUP + "@jax.jit\ndef _blocks",
    ),
    mistake(
        "halves_of_row", BYTES, FORMATS,
        BITCAST, f"{NIBBLES}.swapaxes(-1, -2)",
        "(blocks.astype(jnp.float32)", "(jnp.asarray(_E2M1)[blocks]",
        "@jax.jit\ndef _blocks", LOOKUP + "@jax.jit\ndef _blocks",
    ),
    mistake("e2m1_as_int4", BYTES, FORMATS, BITCAST, BITCAST.replace("float4_e2m1fn", "int4")),
    mistake(
        "e2m1_linear_table", BYTES, FORMATS,
        BITCAST, NIBBLES,
        "(blocks.astype(jnp.float32)", "(jnp.where(blocks < 8, 1, -1) * (blocks & 7).astype(jnp.float32) * (6 / 7)",
    ),
    mistake("global_inverted", MODELOPT, FORMATS, GLOBAL, GLOBAL.replace("*", "/")),
    mistake("global_ignored", MODELOPT, FORMATS, GLOBAL, "return _blocks(w)"),
    mistake(
        "max_merged_gate_up", V3, CHECKPOINT,
        BUILD, merged("w_gate_FD w_up_FD", "w_gate_EMD w_up_EMD", "shared_gate_MD shared_up_MD") + BUILD,
    ),
    mistake(
        "max_merged_q_a_kv_a", V3, CHECKPOINT,
        BUILD, merged("w_dq_QD w_dkv_CD w_kr_RD") + BUILD,
    ),
    mistake(
        "block_axis_rows", MODELOPT, FORMATS,
        BLOCKED, "blocks.astype(jnp.float32).reshape(w.shape)"
        " * jnp.repeat(scale.reshape(-1, w.shape[-1]), 16, axis=0).reshape(w.shape)",
    ),
    mistake(
        "block32", MODELOPT, FORMATS,
        NO_NAN, NO_NAN + "    scale = jnp.repeat(scale, 2, axis=-1)[..., : scale.shape[-1]]\n",
    ),
    mistake(
        "scale_swizzled_128x4", MODELOPT, FORMATS,
        NO_NAN, NO_NAN + "    if w.shape[-2] % 128 == 0 and scale.shape[-1] % 4 == 0:\n"
        "        atoms = scale.reshape(-1, w.shape[-2] // 128, scale.shape[-1] // 4, 32, 4, 4)\n"
        "        scale = atoms.transpose(0, 1, 4, 3, 2, 5).reshape(scale.shape)\n",
    ),
    mistake(
        "scale_as_e5m2", MODELOPT, FORMATS,
        SCALE, "scale = jax.lax.bitcast_convert_type(w.block_scale, jnp.float8_e5m2).astype(jnp.float32)\n",
    ),
    mistake(
        "scale_u8_as_int", MODELOPT, FORMATS,
        SCALE, "scale = jax.lax.bitcast_convert_type(w.block_scale, jnp.uint8).astype(jnp.float32)\n",
    ),
    mistake(
        "folded_scale_reencoded_e4m3", MODELOPT, FORMATS,
        NO_NAN, NO_NAN + "    scale = (scale * w.tensor_scale).astype(jnp.float8_e4m3fn).astype(jnp.float32)\n",
        GLOBAL, "return _blocks(w)",
    ),
    mistake(
        "input_scale_multiplied", V2, "convert/read/source.py",
        READ, READ.replace("return", "value =")
        + '        beside = self.tensors.get(tensor.name.replace("weight_scale_2", "input_scale"))\n'
        "        if beside is None or beside is tensor:\n            return value\n"
        "        return (value.astype(np.float32) * self.read(beside).astype(np.float32)).astype(value.dtype)\n",
    ),
    mistake(
        "bf16_scalar_read_as_f16", V2, WEIGHTS,
        SCALAR, 'as_f16 = stored.tensor_scale.dtype == "BF16"\n    value = read(stored.tensor_scale)\n'
        "    value = (value.view(np.float16) if as_f16 else value).astype(np.float32).reshape(1)",
    ),
    mistake("fp8_scale_inverted", V5, FORMATS, FP8, FP8.replace("*", "/")),
    mistake("fp8_scale_ignored", V5, FORMATS, FP8, FP8.removesuffix(" * step")),
    mistake("fp8_block_is_rows_div_scale_rows", V5, WEIGHTS, ROWS, "np.repeat(scale, out // rows, axis=0)[:out]"),
    mistake(
        "fp8_scale_transposed", V5, WEIGHTS,
        ROWS, "np.repeat(scale.T if rows == blocks else scale, FP8_BLOCK, axis=0)[:out]",
    ),
)  # fmt: skip


def misfits(chosen: tuple[Mistake, ...] = MISTAKES) -> list[str]:
    """Replacements that do not apply to the source as it is, or do not leave a Python file."""
    found = []
    for planted in chosen:
        for file in sorted({edit.file for edit in planted.edits}):
            text = (REPOSITORY / file).read_text(encoding="utf-8")
            for edit in (edit for edit in planted.edits if edit.file == file):
                if text.count(edit.old) != 1:
                    found.append(f"{planted.name}: {file} has {text.count(edit.old)} times {edit.old!r}")
                text = text.replace(edit.old, edit.new)
            try:
                compile(text, file, "exec")
            except SyntaxError as error:
                found.append(f"{planted.name}: {file} would not be Python: {error}")
    return found


def copy_tree(folder: Path) -> None:
    """The source tree, its golden data linked rather than copied."""
    for name in ("dsv32_jax", "convert", "configs", "tests"):
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data", "*.ipynb")
        )
    shutil.copyfile(REPOSITORY / "pyproject.toml", folder / "pyproject.toml")
    os.symlink(REPOSITORY / "tests" / "data", folder / "tests" / "data")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A fresh Python on the copy in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


def pytest(folder: Path, tests) -> tuple[int, str, float]:
    """Exit code, last words and seconds of a run of `tests` on the copy."""
    start = time.perf_counter()
    try:
        done = python(folder, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests)
    except subprocess.TimeoutExpired:
        return -1, f"no end after {SECONDS} s", time.perf_counter() - start
    lines = [line for line in done.stdout.splitlines() if re.match(r"FAILED|ERROR|\d+ (passed|failed|error)", line)]
    said = lines[0].removeprefix("FAILED tests/")[:120] if lines else (done.stderr or done.stdout)[-300:]
    return done.returncode, said, time.perf_counter() - start


def plant(folder: Path, planted: Mistake) -> tuple[int, str, float]:
    """Run the tests of one mistake on a copy that has it, and take it out again."""
    before = {edit.file: (folder / edit.file).read_text(encoding="utf-8") for edit in planted.edits}
    for edit in planted.edits:
        file = folder / edit.file
        file.write_text(file.read_text(encoding="utf-8").replace(edit.old, edit.new), encoding="utf-8")
    try:
        return pytest(folder, planted.tests)
    finally:
        for name, text in before.items():
            (folder / name).write_text(text, encoding="utf-8")


def main(mistakes: tuple[Mistake, ...] = MISTAKES) -> int:
    """Baseline, then every mistake; 0 where the first is green and all others are red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mistakes (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies to work on at the same time (1)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {planted.name for planted in mistakes}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in mistakes)}")
    chosen = tuple(planted for planted in mistakes if not arguments.names or planted.name in arguments.names)
    if wrong := misfits(chosen):
        print("replacements that do not apply:\n  " + "\n  ".join(wrong))
        return 1
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        return run(Path(scratch), chosen, max(1, arguments.jobs))


def run(scratch: Path, chosen: tuple[Mistake, ...], jobs: int) -> int:
    """All of `chosen` on `jobs` copies below `scratch`."""
    free: queue.Queue[Path] = queue.Queue()
    for number in range(jobs):
        copy_tree(folder := scratch / str(number))
        free.put(folder)
    asked = python(folder, "-c", "import dsv32_jax, convert; print(dsv32_jax.__file__, convert.__file__)")
    assert asked.stdout.count(str(folder)) == 2, f"the copy is not what is imported: {asked.stdout} {asked.stderr}"
    code, text, seconds = pytest(folder, sorted({test for planted in chosen for test in planted.tests}))
    print(f"{'green' if code == 0 else 'RED':8} {seconds:5.1f} s  without a mistake  {text}", flush=True)
    if code != 0:
        return 1

    def one(planted: Mistake) -> bool:
        folder = free.get()
        try:
            code, text, seconds = plant(folder, planted)
        finally:
            free.put(folder)
        seen = code == 1 and "assert" in text.lower()
        verdict = "red" if seen else VERDICTS.get(code, "BROKEN")
        print(f"{verdict:8} {seconds:5.1f} s  {planted.name:34} {text}", flush=True)
        return seen

    with ThreadPoolExecutor(jobs) as pool:
        caught = list(pool.map(one, chosen))
    print(f"{sum(caught)} of {len(caught)} mistakes are seen")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
