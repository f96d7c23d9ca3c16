"""`dsv32 bench model`, at tiny size so that it cannot rot: what it makes, what it counts, what it refuses."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax import cli
from dsv32_jax.bench import model as bench, plan as planning, profile
from dsv32_jax.bench.decode_step import DecodeStep, count_weight_bytes, fill_cache, make_model
from dsv32_jax.bench.measure import measure_median
from dsv32_jax.checkpoint.weight_shapes import sum_step_bytes
from dsv32_jax.errors import CapacityError, UsageError
from dsv32_jax.layout import leaves
from dsv32_jax.model.cache import dtype_of
from dsv32_jax.quantization import cache_formats
from tests.conftest import REPOSITORY

TINY = str(REPOSITORY / "configs" / "tiny.json")
MESH = "data=2,expert=2"


@pytest.fixture(scope="module")
def asked():
    return bench.make_plan(TINY, 2, MESH, (2,), (24,), "bfloat16", 3)


def test_weights_are_the_same_wherever_they_are_made(asked):
    """Each device holds its part, and as many bytes as were predicted."""
    alone, spread = make_model(asked.cfg), make_model(asked.cfg, asked.mesh)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    held = sum(part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(spread))
    assert held == sum(count_weight_bytes(asked.cfg, asked.mesh).values())
    assert spread.layers[1].ffn.w_gate_EMD.codes.sharding.spec[0] == "expert"


def test_rows(asked):
    """One for the weights, one a batch and context and its parts, one for reading at the beginning and behind each."""
    made, decode, parts, first, read = bench.measure_model(asked, seconds=0.0)
    assert made["kind"] == "made" and made["memory"] > 0 and made["copied"] > 0 and made["all_reduce"] > 0
    assert decode["cpu"] > 0
    assert decode["floor"] > decode["read"] / made["copied"] + made["all_reduce"]
    assert (decode["batch"], decode["context"]) == (2, 24) and decode["step"] > 0 and decode["compile"] > 0
    assert {"attention", "experts", "head", "sampling", "collectives"} <= set(parts["parts"])
    assert parts["parts"].keys() <= {*profile.SCOPES, profile.OTHER, "collectives"}
    assert sum(parts["parts"].values()) > 0 and 0 < decode["share"]
    assert first["kind"] == read["kind"] == "read" and first["context"] == 0 and read["step"] > 0
    assert bench.format_row(read).startswith("prefill of ")
    assert "attention" in bench.format_row(parts)
    headings, line = bench.format_row(made).splitlines()[1], bench.format_row(decode)
    assert headings.split()[:3] == ["batch", "context", "step"] and len(line) <= len(headings)


def test_experts_in_host_memory():
    """A device holds and reads less by what the host holds and reads, and the step is the same."""
    plans = [bench.make_plan(TINY, 3, None, (2,), (24,), "bfloat16", 3, where) for where in ("device", "host:1")]
    assert len(plans[1].host) == 3 and not plans[0].host
    tokens, found = [], []
    for plan in plans:
        made, decode, parts, *_ = bench.measure_model(plan, seconds=0.0)
        assert ("host experts" in parts["parts"]) == (made["host_call"] > 0) == bool(plan.host)
        found.append((made["host_read"], decode["read"], decode["host_read"]))
        cache = fill_cache(plan.cfg, 64, plan.cache_dtype, 2, 24)
        tokens.append(DecodeStep(make_model(plan.cfg, None, plan.host), cache, 3).run().tolist())
    (none, whole, nothing), (speed, rest, host) = found
    assert none == nothing == 0 and speed > 0 and host > 0
    assert rest + host == pytest.approx(whole, rel=0.2), "the share of experts is measured"
    assert tokens[0] == tokens[1]


def test_a_filled_cache_has_no_empty_slot(asked):
    """Different in every slot, component and layer, of standard deviation 1; the last slot is for the new token."""
    cache = fill_cache(asked.cfg, 64, dtype_of("bfloat16", jnp.bfloat16))
    assert cache.length_B.tolist() == [63] and cache.capacity == 64 and len(cache.layers) == 2
    values = [layer.latents(jnp.float32)[0] for layer in cache.layers]
    values += [cache_formats.read(layer.k_index_yqJ, jnp.float32)[:, :64] for layer in cache.layers]
    assert len({value.tobytes() for array in values for value in np.asarray(array)[0, :, :16]}) == 4 * 64
    assert all(abs(float(array.std()) - 1) < 0.05 for array in values)


def test_a_step_stays_in_the_last_slot(asked):
    """Each run processes one token at the same place, the cache having been handed over."""
    cache = fill_cache(asked.cfg, 32, dtype_of("bfloat16", jnp.bfloat16))
    before = np.asarray(cache_formats.read(cache.layers[0].k_index_yqJ, jnp.float32)[:, :32])
    step = DecodeStep(make_model(asked.cfg), cache)
    for _ in range(3):
        step.run()
    assert step.state.cache.length_B.tolist() == [32] and step.state.step_B.tolist() == [3]
    after = np.asarray(cache_formats.read(step.state.cache.layers[0].k_index_yqJ, jnp.float32)[:, :32])
    assert (before != after).any(axis=-1).tolist() == [[False] * 31 + [True]]


def test_kernels_that_exchange():
    """On GPUs NCCL's kernels are collectives, whatever instruction the profile names; unknown events are nothing."""

    def event(name, microseconds, **stats):
        return SimpleNamespace(name=name, duration_ns=microseconds * 1e3, stats=tuple(stats.items()))

    nccl = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        event(nccl, 20),
        event(nccl, 10, hlo_op="all-reduce.7"),
        event("other", 99),
        event("dot_3", 4, hlo_op="dot.3"),
    ]
    lines = [SimpleNamespace(events=events)]
    devices = [SimpleNamespace(name=f"/device:GPU:{i}", lines=lines) for i in range(2)]
    found = profile.sum_by_scope(
        SimpleNamespace(planes=[*devices, SimpleNamespace(name="/host:CPU", lines=lines)]), {"dot_3": "head"}
    )
    assert found == pytest.approx({"collectives": 30e-6, "head": 4e-6})


def test_sums_over_devices_are_collectives():
    """As instructions of their own, and in the kernels that XLA makes of small ones."""
    where = 'metadata={op_name="jit(decode)/while/body/jit(run)/projections/'
    text = f"""
      %all-reduce.7 = f32[8,7168]{{1,0}} all-reduce(%dot.3), {where}shard_map/psum"}}
      %psum_63_0_fusion.1 = f32[1,1,7168]{{2,1,0}} fusion(%dot.3), kind=kCustom, calls=%fused, {where}shard_map/psum"}}
      ROOT %dot.3 = f32[1,1,7168]{{2,1,0}} custom-call(%x, %w), {where}dot_general"}}
      %while.1 = (s32[]) while(%x), {where}while"}}
    """
    collectives = dict.fromkeys(("all_reduce_7", "psum_63_0_fusion_1"), "collectives")
    assert profile.find_scopes(text) == {**collectives, "dot_3": "projections"}


def test_bytes_of_a_step(asked):
    """A step reads the experts that its rows choose, and everything else but the embedding."""
    weights = count_weight_bytes(asked.cfg, None)
    whole = sum(weights.values()) - weights["embed_VD"]
    banks = sum(size for path, size in weights.items() if path.endswith(("EMD", "EDM")))
    table = {leaf.path: leaf for leaf in leaves(asked.cfg)}
    assert sum_step_bytes(table, weights, 1.0) == pytest.approx(whole)
    assert sum_step_bytes(table, weights, 0.25) == pytest.approx(whole - banks * 0.75)


def test_rows_choose_their_own_experts(asked):
    """One row has as many as the config says, rows that are alike no more, and different rows have more."""
    model = make_model(asked.cfg)
    alone = asked.cfg.num_experts_per_tok / asked.cfg.n_routed_experts
    for tokens, least, most in (([5], alone, alone), ([5, 5, 5, 5], alone, 0.99), ([5, 9, 77, 130], 1.5 * alone, 1)):
        assert least <= bench.measure_expert_share(model, np.array(tokens)) <= most


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(planning.memory, "get_free_memory", lambda devices: 10_000)
    with pytest.raises(CapacityError, match=r"2 layers need .* nothing was made. Use fewer layers"):
        planning.require_room(bench.make_plan(TINY, 2, None, (1,), (24,), "fp8", 1))
    with pytest.raises(CapacityError, match="expert=8"):
        bench.make_plan(TINY, 2, "expert=8", (1,), (24,), "fp8", 1)


def test_caches_that_do_not_fit_are_refused(monkeypatch):
    """Weights fit alone; many rows of a long context beside them do not."""
    weights = sum(count_weight_bytes(ds.Config.from_json(TINY), None).values())
    monkeypatch.setattr(planning.memory, "get_free_memory", lambda devices: 4 * weights)
    planning.require_room(bench.make_plan(TINY, 2, None, (1,), (24,), "fp8", 1))
    with pytest.raises(CapacityError, match=r"caches of 64 rows on each device, .* nothing was made"):
        planning.require_room(bench.make_plan(TINY, 2, None, (1, 64), (24, 32768), "fp8", 1))


def test_the_split_that_fits_is_named(monkeypatch, capsys):
    """Of the whole model on two GPUs of 81 GB and a host of 256 GiB, counted to the byte; what it names is taken, and
    one layer less is not. Nothing fits on a smaller host."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(planning.memory, "get_free_memory", lambda devices: 81_000_000_000)
    real = str(REPOSITORY / "configs" / "deepseek_v32.json")
    plan = bench.make_plan(real, None, "model=2", (1, 8), (1024, 8000), "bfloat16", None, "host:0")
    with pytest.raises(CapacityError, match=r"nothing was made\. Use experts=.host:(\d+)") as refused:
        planning.require_room(plan, 268_000_000_000)
    count = int(str(refused.value).rpartition("host:")[2].rstrip('"'))
    found = planning.require_room(dataclasses.replace(plan, host_layers=count), 268_000_000_000)
    assert found.host == count * 256 * 3 * (2048 * 7168 * 9 // 16 + 4), "codes and scales, 4.5 bits, and a tensor scale"
    assert not planning.make_budget(dataclasses.replace(plan, host_layers=count - 1), 268_000_000_000).fits
    with pytest.raises(CapacityError, match=r"of 128.0 GB of host memory; nothing was made. Use fewer layers"):
        planning.require_room(dataclasses.replace(plan, host_layers=count), 128_000_000_000)


def test_numbers_below_one_are_refused():
    with pytest.raises(UsageError, match="1 or more, not 0, -3; nothing was made"):
        bench.make_plan(TINY, 2, None, (1, 0), (24,), "fp8", -3)


def test_the_command(capsys, monkeypatch):
    """JSON lines."""
    monkeypatch.setattr(bench, "measure_median", lambda run, seconds: measure_median(run, 0.0))
    sizes = ["--layers", "1", "--batch", "1", "--context", "16", "--steps", "2", "--cache-dtype", "fp8"]
    assert cli.main(["bench", "model", "--config", TINY, *sizes, "--json"]) == 0
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["plan", "made", "decode", "parts", "read", "read"]


def test_the_whole_model_on_four_devices():
    """Experts are a quarter on each; attention, too, is cut where heads are."""
    cfg = ds.Config.from_json(REPOSITORY / "configs" / "deepseek_v32.json")
    assert 385e9 < sum(count_weight_bytes(cfg, None).values()) < 415e9
    four = sum(count_weight_bytes(cfg, ds.mesh("expert=4")).values())
    assert 98e9 < four < 125e9
    assert sum(count_weight_bytes(cfg, ds.mesh("expert=4,model=2")).values()) < 0.6 * four
