"""Experts in host memory: the same tokens wherever a layer's experts are, on one device and on meshes.

On a CPU the same call is made as on a GPU, where `python -m tests.gpu_host` compares.
"""

import dataclasses
import gc
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax import cli
from dsv32_jax.checkpoint import host_split
from dsv32_jax.checkpoint.load import Checkpoint
from dsv32_jax.checkpoint.weight_shapes import read_weight_shapes
from dsv32_jax.errors import CapacityError, UsageError
from dsv32_jax.generation.batch import Batch
from dsv32_jax.kernels import cpu, host_experts
from dsv32_jax.model.experts import apply_experts
from dsv32_jax.quantization.host_weight import HostWeight, find_host_weights
from dsv32_jax.system import compilation
from tests import golden
from tests.conftest import DATA
from tests.golden import having
from tests.test_golden import LOGITS
from tests.test_load import Maps

pytestmark = pytest.mark.skipif(bool(cpu.find_obstacle()), reason="needs the C++ kernels")


@pytest.fixture(scope="module")
def stored(scratch):
    return golden.case(DATA / "golden_nvfp4/v2_modelopt_mlp_oproj_mtp", scratch)


def load(case, experts: str, **options):
    return ds.load(case.converted, dtype=jnp.float32, experts=experts, **options)


def generate(model, stored) -> bool:
    """Whether the greedy tokens are those of the golden results."""
    return ds.generate(model, stored.ids.tolist(), max_new_tokens=16).tokens == stored["decode.gen_ids"].tolist()


@having("decode.gen_ids")
def test_goldens(case):
    """Logits and greedy tokens of every golden checkpoint, of every format, with all experts on the host."""
    model = load(case, "host")
    assert all(isinstance(layer.ffn.w_up_EMD, HostWeight) for layer in model.layers[case.cfg.first_k_dense_replace :])
    case.close("logits", ds.forward(model, case.ids).logits, case["logits"], LOGITS)
    assert generate(model, case)


def test_every_split(stored):
    """`host:N` for every N, and drafts: the tokens do not depend on it."""
    layers = stored.cfg.num_hidden_layers - stored.cfg.first_k_dense_replace
    for split in range(layers + 1):
        model = load(stored, f"host:{split}")
        moe = [layer.ffn for layer in model.layers[stored.cfg.first_k_dense_replace :]]
        assert [isinstance(ffn.w_up_EMD, HostWeight) for ffn in moe] == [True] * split + [False] * (layers - split)
        made = ds.generate(model, stored.ids.tolist(), max_new_tokens=16, draft=split % 2)
        assert made.tokens == stored["decode.gen_ids"].tolist()


@pytest.mark.parametrize(
    ("axes", "split"),
    [
        ("expert=4,model=2", "host"),
        ("data=2,expert=2,model=2", "host"),
        ("model=2", "host"),
        ("expert=2", "host:1"),
        ("data=2", "host:1"),
    ],
)
def test_meshes(axes, split, stored, monkeypatch):
    """Each matrix is used by one device of a mesh, and no device has it in its memory. The host applies each token's
    experts once, also where all devices of the axis "data" have the token."""
    calls, mix = [], host_experts.mix

    def record(h_tD, expert_tX, gate_tX, *banks):
        ids = banks[0].matrix.reshape(-1).at[expert_tX].get(mode="fill", fill_value=-1)
        jax.debug.callback(lambda found: calls.append(int((found >= 0).sum())), ids)
        return mix(h_tD, expert_tX, gate_tX, *banks)

    monkeypatch.setattr(host_experts, "mix", record)
    jax.clear_caches()
    model = load(stored, split, mesh=ds.mesh(axes))
    banks = [w for layer in model.layers for w in find_host_weights(layer)]
    for weight in banks:
        ids = [shard.data.reshape(-1) for shard in weight.matrix.addressable_shards]
        used = np.concatenate([np.asarray(shard)[np.asarray(shard) >= 0] for shard in ids])
        assert len(used) == weight.shape[0] * model.mesh.shape.get("data", 1)
        assert len(set(used.tolist())) == weight.shape[0]
    tokens = stored.ids[:1, : (stored.ids.shape[1] - 1) | 1]  # an odd number
    stored.close("logits", ds.forward(model, tokens).logits, stored["logits"][:1, : tokens.size], LOGITS)
    jax.effects_barrier()
    assert sum(calls) == tokens.size * stored.cfg.num_experts_per_tok * len(banks) // 3
    assert generate(model, stored)


@pytest.mark.parametrize("axes", [None, "expert=4,model=2"])
def test_many_tokens_have_the_matrices_sent(axes, stored, monkeypatch):
    """What a GPU does with a prompt."""
    monkeypatch.setattr(host_experts, "pays_to_fetch", lambda tokens: True)
    jax.clear_caches()
    model = load(stored, "host", mesh=None if axes is None else ds.mesh(axes))
    stored.close("logits", ds.forward(model, stored.ids).logits, stored["logits"], LOGITS)
    jax.clear_caches()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_host_equals_device(tokens, dtype, stored):
    """One layer, with ids that are no expert, and all of them."""
    on_device, on_host = (load(stored, where).layers[-1].ffn for where in ("device", "host"))
    experts, rng = on_device.routed[0].shape[0], np.random.default_rng(tokens)
    h_tD = jnp.asarray(rng.standard_normal((tokens, stored.cfg.hidden_size)), dtype)
    gate_tX = jnp.asarray(rng.random((tokens, 3)), jnp.float32)
    for expert_tX in (rng.integers(0, experts + 1, (tokens, 3)), np.full((tokens, 3), experts)):
        arguments = h_tD, jnp.asarray(expert_tX, jnp.int32), gate_tX
        want, got = (jax.jit(apply_experts)(*arguments, *ffn.routed) for ffn in (on_device, on_host))
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_nothing_is_copied(stored):
    """The arrays are maps of the files, layers share one program, and a model that is gone leaves nothing behind."""
    model = load(stored, "host")
    banks = [layer.ffn.w_up_EMD for layer in model.layers[stored.cfg.first_k_dense_replace :]]
    maps = Maps()
    for bank in banks:
        (values, *_) = jax.tree.leaves(bank.arrays.weight)
        assert maps.file_at(values.ctypes.data).startswith(str(stored.converted))
    first, second = (jax.tree.structure(layer.ffn) for layer in model.layers[-2:])
    assert first == second
    assert "in host memory" in repr(model)
    assert sum(array.nbytes for array in jax.tree.leaves(banks)) < banks[0].nbytes


def test_a_freed_model_is_an_error_and_nothing_hangs(stored):
    """The fault that a call on the host can have: it is told, and the next call works."""
    jax.clear_caches()
    model = load(stored, "host")
    weight = model.layers[-1].ffn.w_up_EMD
    arrays, first = host_experts.keep(weight.arrays.weight)
    lost = [HostWeight(jnp.arange(first, first + weight.shape[0]).reshape(-1, 1, 1), arrays) for _ in range(3)]
    h_tD = jnp.ones((2, stored.cfg.hidden_size), jnp.float32)
    expert_tX, gate_tX = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
    ids = [np.asarray(bank.matrix) for bank in lost]
    del arrays, lost
    gc.collect()
    dead = [HostWeight(jnp.asarray(matrix), weight.arrays) for matrix in ids]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"matrix \d+ is not in host memory: its model was freed"):
        jax.block_until_ready(host_experts.mix(h_tD, expert_tX, gate_tX, *dead))
    ffn = model.layers[-1].ffn
    assert np.isfinite(np.asarray(host_experts.mix(h_tD, expert_tX, gate_tX, *ffn.routed))).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_threads_that_fail(tmp_path):
    """What an item of work throws, on whatever thread, reaches the caller; threads that do not start are not needed."""
    source, program = Path(__file__).with_name("host_faults.cc"), tmp_path / "program"
    subprocess.run(["g++", "-std=c++17", "-O0", "-pthread", str(source), "-ldl", "-o", str(program)], check=True)
    for threads in ("0", "1", "9"):
        done = subprocess.run([program, threads], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def model(stored):
    return load(stored, "host")


def test_the_host_without_memory(model, stored):
    """It is told what has none, and the next call works."""
    library, last = host_experts.load_library(), model.layers[-1]
    huge = 1 << 50
    sizes = {"w_gate_EMD": (huge, stored.cfg.hidden_size), "w_up_EMD": (huge, stored.cfg.hidden_size)}
    sizes["w_down_EDM"] = (stored.cfg.hidden_size, huge)
    first = {name: library.dsv32_host_add(2, 1 << 20, *size, 0, 0, None, None, None) for name, size in sizes.items()}
    banks = {name: getattr(last.ffn, name) for name in sizes}
    lost = {name: dataclasses.replace(w, matrix=jnp.full_like(w.matrix, first[name])) for name, w in banks.items()}
    ffn = dataclasses.replace(last.ffn, **lost)
    broken = dataclasses.replace(model, layers=(*model.layers[:-1], dataclasses.replace(last, ffn=ffn)))
    try:
        with pytest.raises(CapacityError, match="the host has no memory for applying its experts. The model stays"):
            generate(broken, stored)
    finally:
        for id in first.values():
            library.dsv32_host_remove(id)
    assert generate(model, stored)


def test_a_device_without_memory(model, stored, monkeypatch):
    """More layers in host memory are a remedy."""

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "decode", fail)
        with pytest.raises(CapacityError, match=r'experts="host:\d+", or cache_dtype="fp8"'):
            generate(model, stored)
    assert generate(model, stored)


def test_ctrl_c_in_a_call_of_the_host(model, stored, monkeypatch):
    """Rows end as they are when the program has ended, and the next call works."""
    decode = Batch.decode

    def press(*arguments):
        patch.undo()
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "decode", press)
        made = ds.generate(model, stored.ids.tolist(), max_new_tokens=64)
    assert set(made.finish_reason) == {"interrupted"}
    assert all(0 < len(row) < 64 for row in made.tokens)
    assert generate(model, stored)


def test_a_fault_in_a_stream_is_the_cause_of_what_it_made_nan(stored, monkeypatch):
    """On a GPU the outputs of a call that failed are NaN; the error says why instead of blaming the weights."""
    model = load(stored, "host")
    assert host_experts.take_error() == ""
    broken = dataclasses.replace(model, norm_D=model.norm_D * jnp.nan)
    monkeypatch.setattr(host_experts, "take_error", lambda: "experts in host memory: no thread")
    with pytest.raises(FloatingPointError, match="experts in host memory: no thread"):
        ds.generate(broken, [[5, 6]], max_new_tokens=2)


def test_what_the_devices_cannot_hold(stored, monkeypatch, capsys):
    """As few layers as need be stay in host memory; what does not fit is refused before a weight is read, with the
    split that does fit, in Python and on the command line."""
    checkpoint = Checkpoint.open(stored.converted)
    sizes = read_weight_shapes(stored.converted).count_device_bytes({}, jnp.float32)
    each, total = host_split.measure_layers(stored.cfg, checkpoint.table, sizes), sum(sizes.values())
    assert len(each) >= 2 and min(each) > 0

    def split(free: float, experts: str) -> int:
        monkeypatch.setattr(compilation, "get_device_memory", lambda: int(free))
        ffn = [layer.ffn for layer in load(stored, experts).layers[stored.cfg.first_k_dense_replace :]]
        return sum(isinstance(one.w_up_EMD, HostWeight) for one in ffn)

    for share in (host_split.WEIGHT_SHARE, 1):
        monkeypatch.setattr(host_split, "WEIGHT_SHARE", share)
        assert split(total / share + 1, "host") == 0 and split(total / share - 1, "host") == 1
        assert split((total - sum(each)) / share + 1, "host") == len(each)
        assert split(total, "device") == 0, "who asks for it may fill the devices"
    monkeypatch.setattr(Checkpoint, "weights", None)  # nothing may be read
    with pytest.raises(CapacityError, match=r'with experts="device" .*nothing was read. Use experts="host:1"'):
        split(total - 1, "device")
    with pytest.raises(CapacityError, match=r'with experts="host:0" .*Use experts="host:2"'):
        split(total - each[0] - 1, "host:0")
    with pytest.raises(CapacityError, match=r'with experts="host" .*Use more devices: .* no routed experts take'):
        split(total - sum(each) - 1, "host")
    monkeypatch.setattr(compilation, "get_device_memory", lambda: total - 1)
    assert (
        cli.main(["generate", str(stored.converted), "5,6", "--ids", "--dtype", "float32"]) == CapacityError.exit_code
    )
    assert "Use --experts host:1" in " ".join(capsys.readouterr().err.split())


def test_without_kernels_nothing_is_read(stored, monkeypatch):
    def fail():
        raise UsageError("experts in host memory need the C++ kernels: no compiler")

    monkeypatch.setattr(host_experts, "load_library", fail)
    monkeypatch.setattr(Checkpoint, "weights", None)
    with pytest.raises(UsageError, match="need the C\\+\\+ kernels: no compiler"):
        load(stored, "host")


@pytest.mark.parametrize("experts", ["gpu", "host:", "host:-1", "host:99", "HOST", 3, None])
def test_other_words_are_refused(experts, stored):
    message = re.escape("""experts must be "device", "host" or "host:N" with at most""")
    with pytest.raises(UsageError, match=message):
        load(stored, experts)
