"""Experts in host memory: the same tokens wherever a layer's experts are, on one device and on meshes.

On a CPU the same call is made as on a GPU, where `python -m tests.gpu_host` compares.
"""

import dataclasses
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax.errors import UsageError
from dsv32_jax.kernels import cpu, host_experts
from dsv32_jax.model.experts import apply_experts
from dsv32_jax.quantization.host_weight import HostWeight
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


@having("decode.gen_ids")
def test_goldens(case):
    """Logits and greedy tokens of every golden checkpoint, of every format, with all experts on the host."""
    model = load(case, "host")
    assert all(isinstance(layer.ffn.w_up_EMD, HostWeight) for layer in model.layers[case.cfg.first_k_dense_replace :])
    case.close("logits", ds.forward(model, case.ids).logits, case["logits"], LOGITS)
    assert ds.generate(model, case.ids.tolist(), max_new_tokens=16).tokens == case["decode.gen_ids"].tolist()


def test_every_split(stored):
    """`host:N` for every N, and drafts: the tokens do not depend on it."""
    layers = stored.cfg.num_hidden_layers - stored.cfg.first_k_dense_replace
    for split in range(layers + 1):
        model = load(stored, f"host:{split}")
        moe = [layer.ffn for layer in model.layers[stored.cfg.first_k_dense_replace :]]
        assert [isinstance(ffn.w_up_EMD, HostWeight) for ffn in moe] == [True] * split + [False] * (layers - split)
        made = ds.generate(model, stored.ids.tolist(), max_new_tokens=16, draft=split % 2)
        assert made.tokens == stored["decode.gen_ids"].tolist()


@pytest.mark.parametrize("axes", ["expert=4,model=2", "data=2,expert=2,model=2", "model=2"])
def test_meshes(axes, stored):
    """Each matrix is used by one device of a mesh, and no device has it in its memory."""
    model = load(stored, "host", mesh=ds.mesh(axes))
    weight = model.layers[-1].ffn.w_up_EMD
    ids = [shard.data.reshape(-1) for shard in weight.matrix.addressable_shards]
    used = np.concatenate([np.asarray(shard)[np.asarray(shard) >= 0] for shard in ids])
    assert len(used) == weight.shape[0] * model.mesh.shape.get("data", 1) and len(set(used.tolist())) == weight.shape[0]
    stored.close("logits", ds.forward(model, stored.ids).logits, stored["logits"], LOGITS)
    assert ds.generate(model, stored.ids.tolist(), max_new_tokens=16).tokens == stored["decode.gen_ids"].tolist()


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


def test_a_fault_in_a_stream_is_the_cause_of_what_it_made_nan(stored, monkeypatch):
    """On a GPU the outputs of a call that failed are NaN; the error says why instead of blaming the weights."""
    model = load(stored, "host")
    assert host_experts.take_error() == ""
    broken = dataclasses.replace(model, norm_D=model.norm_D * jnp.nan)
    monkeypatch.setattr(host_experts, "take_error", lambda: "experts in host memory: no thread")
    with pytest.raises(FloatingPointError, match="experts in host memory: no thread"):
        ds.generate(broken, [[5, 6]], max_new_tokens=2)


@pytest.mark.parametrize("experts", ["gpu", "host:", "host:-1", "host:99", "HOST", 3, None])
def test_other_words_are_refused(experts, stored):
    message = re.escape("""experts must be "device", "host" or "host:N" with at most""")
    with pytest.raises(UsageError, match=message):
        load(stored, experts)
