"""Sharded is unsharded: the golden checkpoint on eight virtual devices, cut along experts, heads and rows.

MESHES=all goes through every mesh that divides it.
"""

import dataclasses
import itertools
import math
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax.checkpoint.weight_shapes import read_weight_shapes
from dsv32_jax.errors import CapacityError, UsageError
from dsv32_jax.generation.batch import SEGMENT_TOKENS
from dsv32_jax.generation.prefill_decode import empty_caches, new_state, place, step
from dsv32_jax.generation.programs import WHOLE
from dsv32_jax.generation.sampler import make_params
from dsv32_jax.layout import leaves
from dsv32_jax.model.cache import Cache
from dsv32_jax.model.experts import apply_shared_expert, mix_experts, mix_experts_on_mesh
from dsv32_jax.parallel import partition
from dsv32_jax.parallel.sharding import count_row_groups
from tests import golden
from tests.conftest import DATA

MESHES = ["expert=4,model=2", "data=2,expert=2,model=2", "model=2", "data=4"]
if os.environ.get("MESHES") == "all":
    sizes = [(data, expert, model) for data, expert, model in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2))]
    MESHES = [f"data={d},expert={e},model={m}" for d, e, m in sizes if 1 < d * e * m <= 8]


@pytest.fixture(scope="module")
def checkpoint(scratch):
    return golden.case(DATA / "golden_nvfp4/v2_modelopt_mlp_oproj_mtp", scratch)


@pytest.fixture(scope="module", params=MESHES)
def sharded(checkpoint, request):
    """The model on a mesh."""
    return ds.load(checkpoint.converted, dtype=jnp.float32, mesh=ds.mesh(request.param))


def test_forward_and_generate(checkpoint, sharded):
    """Logits within rounding, the same sets, experts and tokens, with drafts too."""
    out = ds.forward(sharded, checkpoint.ids, seen=True)
    np.testing.assert_allclose(out.logits, checkpoint["logits"], atol=1e-3)
    scale = np.abs(checkpoint["logits"]).max()
    alone = ds.forward(checkpoint.model, checkpoint.ids, seen=True)
    assert np.abs(np.asarray(out.logits) - np.asarray(alone.logits)).max() <= 1e-5 * scale
    for seen, want in zip(out.seen, alone.seen, strict=True):
        assert golden.sets(seen.selected_BTk) == golden.sets(want.selected_BTk)
        if seen.routing:
            np.testing.assert_array_equal(seen.routing.expert_BTX, want.routing.expert_BTX)
    made = ds.generate(sharded, checkpoint.ids.tolist(), max_new_tokens=16, draft=1)
    assert made.tokens == checkpoint["decode.gen_ids"].tolist()


def test_a_device_holds_its_part(checkpoint, sharded):
    """Every array is cut as its letters say, and a device has no more than its pieces: what `fit` predicts."""
    mesh = sharded.mesh.shape
    held = dict.fromkeys(sharded.mesh.devices.flat, 0)
    expected = 0
    for part in {id(part): part for part in jax.tree.leaves(sharded)}.values():
        shards = part.addressable_shards
        assert len(shards) == sharded.mesh.size
        for shard in shards:
            held[shard.device] += shard.data.nbytes
        expected += math.prod(part.sharding.shard_shape(part.shape)) * part.dtype.itemsize
    assert set(held.values()) == {expected}
    moe = sharded.layers[-1].ffn
    assert moe.w_gate_EMD.codes.sharding.spec == jax.sharding.PartitionSpec(
        *(axis if axis in mesh else None for axis in ("expert", "model", None))
    )
    assert expected == sum(read_weight_shapes(checkpoint.converted).device_bytes(dict(mesh), jnp.float32))
    whole = sum(part.nbytes for part in jax.tree.leaves(checkpoint.model))
    assert expected < whole or not {"expert", "model"} & {axis for axis, size in mesh.items() if size > 1}


def test_no_weight_is_gathered(checkpoint, sharded):
    """The compiled decode loop moves activations between devices: nothing as large as the smallest cut weight. Which
    token's row is looked up where is not left to the compiler: for a GPU it gathers the whole embedding. What comes out
    is spread as it went in, so the next call needs no program of its own."""
    rows, cfg = 4, checkpoint.cfg
    cache, _ = empty_caches(cfg, 2 * rows, 64, np.dtype(np.float32), 0)
    table_Bd = np.arange(2 * rows, dtype=np.int32).reshape(rows, 2) % (2 * rows // count_row_groups(sharded.mesh, rows))
    cache = Cache(cache.layers, np.zeros(rows, np.int32), table_Bd)
    state = dataclasses.replace(new_state(sharded, (cache, None), 0), done_B=place(sharded, np.zeros(rows, bool)))
    params = make_params([ds.Sampling()] * rows, cfg.vocab_size, cfg.vocab_size, cfg.eos_token_id, max_new=16)
    params = place(sharded, params)
    lowered = WHOLE.decode.lower(step, sharded, params, state, 5, 0, SEGMENT_TOKENS, 0)
    program = lowered.compile()
    for part, after in zip(jax.tree.leaves(state), jax.tree.leaves(program.output_shardings[0]), strict=True):
        assert part.sharding.is_equivalent_to(after, part.ndim)
    text = program.as_text()
    layers, mesh = checkpoint.cfg.num_hidden_layers, sharded.mesh.shape
    waits = len(re.findall(r" (?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text))
    model, expert = (mesh.get(axis, 1) > 1 for axis in ("model", "expert"))
    assert waits <= layers * (model + (model or expert)) + 4
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)(?:-start)?\(", text)
    largest = max((math.prod(map(int, shape.split(","))) for shape in moved if shape), default=0)
    assert "all-reduce" in text
    assert largest <= rows * max(checkpoint.cfg.num_attention_heads * 64, checkpoint.cfg.vocab_size)
    looked_up = re.findall(r'"stablehlo\.gather".*: \(tensor<(\d+x\d+)x\w+>', lowered.as_text())
    parts = mesh.get("model", 1)
    assert f"{checkpoint.cfg.vocab_size // parts}x{checkpoint.cfg.hidden_size}" in looked_up
    assert parts == 1 or f"{checkpoint.cfg.vocab_size}x{checkpoint.cfg.hidden_size}" not in looked_up


def test_experts_over_a_mesh():
    """Any assignment, many tokens and few: the sum over devices is that of routed and shared experts, none missed."""
    rng = np.random.default_rng(0)
    shapes = [(8, 6, 16), (8, 6, 16), (8, 16, 6)]
    routed = tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)
    shared = tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for _, *shape in shapes)
    mesh = ds.mesh("expert=4,model=2")
    over_devices, alone = jax.jit(partial(mix_experts_on_mesh, mesh)), jax.jit(mix_experts)
    for tokens in (1, 40):
        h = jnp.asarray(rng.standard_normal((tokens, 16), np.float32))
        experts = jnp.asarray(np.argsort(rng.random((tokens, 8)))[:, :3].astype(np.int32))
        gates = jnp.asarray(rng.random((tokens, 3), np.float32))
        want = alone(h, experts, gates, routed, shared)
        got = over_devices(h, experts, gates, routed, shared)
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
        none = over_devices(h, jnp.full_like(experts, 8), gates, routed, shared)
        np.testing.assert_allclose(
            none, jax.jit(apply_shared_expert)(h, *shared), atol=1e-5 * float(jnp.abs(none).max())
        )


@pytest.mark.parametrize("size", [64, 128, 192, 256, 320])
def test_fp8_blocks_are_not_cut(tiny, size):
    """A device has whole blocks of 128 of each matrix, or all of its one block: what would cut one is refused."""
    leaf = next(leaf for leaf in leaves(tiny) if leaf.letters == "EDM")
    leaf = leaf._replace(shape=(*leaf.shape[:2], size))
    blocks = (*leaf.shape[:2], -(-size // 128))
    if size in (192, 320):
        with pytest.raises(CapacityError, match=rf"M {size} in {blocks[2]} blocks over model=2 \(possible: 1\)"):
            partition.check_divisible({"model": 2}, [(leaf, leaf.shape), (leaf, blocks)])
    else:
        partition.check_divisible({"model": 2}, [(leaf, leaf.shape), (leaf, blocks)])


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("expert=16", CapacityError, "needs 16 devices, but there are 8"),
        ("experts=2", UsageError, "experts=2"),
        ("expert=0", UsageError, "expert=0"),
        ("", UsageError, "invalid mesh"),
        ({"tensor": 2}, UsageError, "tensor=2"),
    ],
    ids=str,
)
def test_g20_wrong_meshes(text, kind, said):
    """Unknown axes and more devices than there are, by name and number."""
    with pytest.raises(kind, match=said):
        ds.mesh(text)


def test_a_mesh_that_does_not_divide(checkpoint):
    """A table of the leaves, and what would do."""
    with pytest.raises(CapacityError, match=r"expert=3.*possible: 1, 2"):
        ds.load(checkpoint.converted, mesh=ds.mesh("expert=3"))


def test_g19_rows_that_do_not_divide(checkpoint, sharded):
    """Three prompts on any mesh: rows are filled up, and the results are three."""
    prompts = [checkpoint.ids[0, :5].tolist(), checkpoint.ids[1, :3].tolist(), checkpoint.ids[0, :9].tolist()]
    want = ds.generate(checkpoint.model, prompts, max_new_tokens=4).tokens
    assert ds.generate(sharded, prompts, max_new_tokens=4).tokens == want


def test_letters_and_components():
    """An axis that a component does not have is never cut."""
    mesh = {"expert": 2, "model": 2}
    assert partition.find_axes(mesh, "EMD", (8, 1, 1)) == ("expert", None, None)
    assert partition.find_axes(mesh, "EDM", (8, 32, 4)) == ("expert", None, "model")
    assert partition.find_axes({"data": 2}, "EDM", (8, 32, 4)) == (None, None, None)
