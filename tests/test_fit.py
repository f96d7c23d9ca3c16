"""`dsv32 fit`: what it predicts is what is there, on one device and on each of eight."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import convert
import dsv32_jax as ds
from dsv32_jax import cli
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.checkpoint.weight_shapes import FORMATS, WeightShapes, read_weight_shapes
from dsv32_jax.errors import CapacityError, CheckpointError, UsageError
from dsv32_jax.generation import fit as fitting, memory, prefill_decode, speculative, temporaries
from dsv32_jax.generation.batch import SEGMENT_TOKENS
from dsv32_jax.generation.fit import Fit, fit
from dsv32_jax.generation.options import Sampling
from dsv32_jax.generation.prefill_decode import empty_caches, new_state
from dsv32_jax.generation.programs import WHOLE, chunk_size
from dsv32_jax.generation.sampler import make_params
from dsv32_jax.generation.temporaries import Setup, build_shallow, count_temporary, measure_prefill
from dsv32_jax.system import host

REAL = Path(__file__).parents[1] / "configs" / "deepseek_v32.json"
BF16 = np.dtype(jnp.bfloat16)
MESHES = (None, {"expert": 4, "model": 2}, {"data": 2, "expert": 4})


@pytest.fixture(scope="module")
def small(tiny):
    """One dense layer and one of experts, and MTP, in sizes that the meshes divide."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
    return dataclasses.replace(tiny, **sizes, intermediate_size=128, moe_intermediate_size=64, vocab_size=96)


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory) -> dict[str, Path]:
    """`small` in each format that `fit` knows."""
    root = tmp_path_factory.mktemp("fit")
    for storage in ("fp8", "bf16"):
        random_checkpoint.write(root / "originals" / storage, small, storage)
        convert.convert(root / "originals" / storage, root / storage)
    convert.convert(root / "originals" / "fp8", root / "nvfp4", to="nvfp4", policy="nvidia")
    return {format: root / format for format in FORMATS}


@pytest.fixture(scope="module")
def single(small, tmp_path_factory) -> Path:
    """One dense layer, whose programs are compiled quickly."""
    root = tmp_path_factory.mktemp("single")
    sizes = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}
    random_checkpoint.write(root / "original", dataclasses.replace(small, **sizes))
    convert.convert(root / "original", root / "converted")
    return root / "converted"


@pytest.fixture
def no_programs(monkeypatch):
    """Programs that take 1 kB a row and a byte a slot beside a megabyte."""
    monkeypatch.setattr(fitting, "measure_prefill", lambda _, rows, slots: 10**6 + 1000 * rows + slots)


def made_mesh(sizes):
    return sizes and jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def on_each_device(tree) -> set[int]:
    """Bytes that each device holds, of those that hold any."""
    held: dict[int, int] = {}
    for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values():
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return set(held.values())


# ------------------------------------------------------------------------------------------- predictions are the truth


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_has_the_leaves_that_a_conversion_makes(converted, small, tmp_path, format):
    """Every component's dtype and shape, for what NVIDIA, DeepSeek and bfloat16 checkpoints hold."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small.to_dict()))
    predicted, real = read_weight_shapes(file, format), read_weight_shapes(converted[format])
    assert predicted.cfg == real.cfg and predicted.parameters == real.parameters

    assert predicted.weights == real.weights and predicted.homes == real.homes


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("sizes", MESHES)
def test_weights_are_the_bytes_of_a_loaded_model(converted, format, sizes):
    """On one device, and on each of eight."""
    model = ds.load(converted[format], mesh=made_mesh(sizes))
    assert on_each_device(model) == {sum(read_weight_shapes(converted[format]).device_bytes(sizes or {}, BF16))}


def test_w_uk_and_w_uv_are_of_the_compute_dtype(converted):
    """Twice the bytes in float32, and nothing else changes."""
    found = read_weight_shapes(converted["fp8"])
    (stored, half), (again, whole) = found.device_bytes({}, BF16), found.device_bytes({}, np.dtype(np.float32))
    assert stored == again and whole == 2 * half > 0
    assert on_each_device(ds.load(converted["fp8"], dtype=jnp.float32)) == {stored + whole}


def test_a_mesh_that_does_not_divide_is_refused(converted):
    with pytest.raises(CapacityError, match="E 8 over expert=3"):
        read_weight_shapes(converted["nvfp4"]).device_bytes({"expert": 3}, BF16)


def cache_bytes(predicted: Fit, rows: int, vocabulary: int) -> int:
    """Of what `fit` calls the cache, the slots."""
    slots = predicted.cache - rows * vocabulary * memory.VOCABULARY_BYTES
    assert slots == rows * predicted.capacity * predicted.token_bytes
    return slots


def read(folder: Path, sizes, predicted: Fit, tokens: int):
    """The state of four rows of `tokens` tokens, and the program that read them."""
    model = ds.load(folder, mesh=made_mesh(sizes))
    caches = empty_caches(model.cfg, 4, predicted.capacity, np.dtype(predicted.cache_dtype), 0)
    row = jnp.zeros((4, tokens), jnp.int32)
    arguments = (model, new_state(model, caches, 0), row, row, jnp.ones(4, jnp.int32), jnp.arange(4))
    program = WHOLE.prefill.lower(*arguments).compile()
    return program(*arguments), program.memory_analysis()


def test_cache_and_activations_are_those_of_a_model_that_reads(single, monkeypatch):
    """Three rows of 12 tokens are four of a page. Nothing but shapes was compiled for the prediction."""
    measured = []

    def measure(setup, rows, slots):
        """The programs of larger shapes are not compiled here."""
        measured.append((rows, slots))
        return measure_prefill(setup, rows, slots) if len(measured) == 1 else 10**6

    monkeypatch.setattr(fitting, "measure_prefill", measure)
    predicted = fit(single, context=12, batch=3, cache_dtype="fp8")
    state, account = read(single, None, predicted, predicted.capacity)
    assert on_each_device(state.cache.layers) == {cache_bytes(predicted, 4, 96)}
    more = account.output_size_in_bytes - account.alias_size_in_bytes
    assert predicted.activations == account.temp_size_in_bytes + more > 0
    assert measured == [(4, 64), (8, 64), (4, 128)]


def test_rows_are_split_over_data(single, no_programs):
    """After a program has run on the mesh."""
    sizes = {"data": 2, "expert": 4}
    predicted = fit(single, context=12, batch=3, mesh="data=2,expert=4")
    state, _ = read(single, sizes, predicted, 1)
    assert on_each_device(state.cache.layers) == {cache_bytes(predicted, 2, 96)}
    assert fit(single, context=12, mesh="data=2,expert=4").cache == predicted.cache // 2


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp32", "fp8"])
def test_the_drafting_layer_has_a_cache(converted, small, no_programs, cache_dtype):
    predicted = fit(converted["nvfp4"], context=32, batch=2, cache_dtype=cache_dtype, draft=3)
    cache, draft_cache = empty_caches(small, 2, predicted.capacity, np.dtype(predicted.cache_dtype), 3)
    assert on_each_device((cache.layers, draft_cache)) == {cache_bytes(predicted, 2, small.vocab_size)}


def measure_decode(model, rows: int, slots: int, draft: int) -> int:
    """Bytes that decoding takes beside weights and caches, by the account of the program that `generate` runs."""
    params = make_params([Sampling()] * rows, model.cfg.vocab_size, model.cfg.vocab_size)
    caches = functools.partial(empty_caches, model.cfg, rows, slots, BF16, draft)
    state = jax.eval_shape(lambda: new_state(model, caches(), draft))
    step = speculative.step if draft else prefill_decode.step
    return count_temporary(WHOLE.decode.lower(step, model, params, state, 1, 0, SEGMENT_TOKENS, 0))


@pytest.mark.parametrize("draft", [0, 3])
def test_decoding_takes_less_than_what_is_counted(single, converted, draft):
    """Prefill takes more on its way, but for the logits of drafts, which are counted beside it."""
    folder = converted["nvfp4"] if draft else single
    predicted = fit(folder, context=16, batch=4, draft=draft)
    model = build_shallow(read_weight_shapes(folder), BF16, 0)
    assert 0 < measure_decode(model, 4, 16, draft) <= predicted.activations + 4 * 96 * memory.VOCABULARY_BYTES


def test_a_deep_model_is_continued_from_four_layers(monkeypatch):
    """A dense layer, two of experts, and one more; the drafting layer takes part; every leaf is a shape."""
    seen = []

    def lower(model, *_):
        seen.append(model)
        return 1000 + 7 * len(model.layers)

    monkeypatch.setattr(temporaries, "WHOLE", WHOLE._replace(prefill=SimpleNamespace(lower=lower)))
    monkeypatch.setattr(temporaries, "count_temporary", int)
    assert measure_prefill(Setup(read_weight_shapes(REAL), BF16, BF16, 1), 1, 4096) == 1000 + 7 * 61
    assert sorted([type(layer.ffn).__name__ for layer in model.layers] for model in seen) == [
        ["MLP", "MoE", "MoE"],
        ["MLP", "MoE", "MoE", "MoE"],
    ]
    assert all(model.mtp is not None for model in seen)
    leaves = [leaf for model in seen for leaf in jax.tree.leaves(model)]
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


# ---------------------------------------------------------------------------------------------------- the real model


def test_the_real_model(no_programs):
    """671 B parameters and MTP; 788 bytes a token and layer in FP8: 5.87 GiB for 128K tokens."""
    found = fit(REAL, context=131072, cache_dtype="fp8", device_memory="1TB")
    assert 682e9 < found.parameters < 685e9
    assert 405e9 < found.stored < 412e9 and 2.0e9 < found.dequantized < 2.1e9
    assert found.token_bytes == 61 * 788 == 48_068
    assert round(found.token_bytes * found.capacity / 2**30, 2) == 5.87
    assert fit(REAL, context=131072, cache_dtype="fp8", draft=1, device_memory="1TB").token_bytes == 48_856
    assert fit(REAL, context=131072, device_memory="1TB").token_bytes == 61 * 2 * (512 + 64 + 128)
    assert 680e9 < fit(REAL, format="fp8", device_memory="1TB").stored < 720e9
    assert fit(REAL, format="bf16", device_memory="2TB").stored > 1.36e12
    eighth = fit(REAL, mesh="expert=8,model=2", device_memory="1TB")
    assert eighth.devices == 16 and eighth.stored < found.stored / 10 and eighth.dequantized * 2 == found.dequantized


def test_experts_of_the_real_model_in_host_memory(no_programs, capsys):
    """Two GPUs of 80 GB hold some layers' experts, a host of 256 GiB those of the others; a step of one row reads 8 of
    256 of each, and all the rest."""
    asked = {"mesh": "model=2", "context": 8192, "device_memory": "80GB", "host_memory": "256GiB"}
    found = fit(REAL, experts="host", **asked)
    layer = 3 * 256 * (2048 * 7168 * 9 // 16 + 4)
    whole = fit(REAL, **asked)
    assert whole.host_layers == whole.hosted == whole.host_read == 0 and not whole.fits
    assert found.hosted == found.host_layers * layer and found.host_read == pytest.approx(found.hosted / 32)
    assert whole.stored - found.stored == pytest.approx(found.hosted / 2, rel=1e-5), (
        "each device has a half of a matrix"
    )
    assert found.activations - whole.activations == layer, "a device is sent the whole of a layer at a time"
    assert found.stored + found.dequantized <= 0.85 * found.free < found.stored + found.dequantized + layer / 2
    assert whole.split == found.split and found.split is not None and 35 < found.split <= found.host_layers <= 58
    assert fit(REAL, experts=f"host:{found.split}", **asked).fits
    assert not fit(REAL, experts=f"host:{found.split - 1}", **asked).fits
    assert fit(REAL, **asked | {"host_memory": "128GiB"}).split is None, "neither has room"
    least = found.device_read / 2e12 + found.host_read / 100e9
    assert found.estimate_rate(2e12, 100e9) == pytest.approx(1 / least)

    options = [part for name, value in asked.items() for part in ("--" + name.replace("_", "-"), value)]
    code, out, _ = run(capsys, REAL, "--experts", f"host:{found.split}", *options, "--host-speed", "100GB")
    assert code == 0 and f"experts of the first {found.split} MoE layers" in out and "free there" in out
    assert "give --device-speed; the host reads 100 GB/s, given" in " ".join(out.split())
    code, out, _ = run(capsys, REAL, *options)
    assert code == 5 and f"does not fit, but would with --experts host:{found.split}: 1 row" in out
    speeds = ("--device-speed", "2TB", "--host-speed", "100GB")
    code, out, _ = run(capsys, REAL, "--experts", f"host:{found.host_layers}", *options, *speeds, "--json")
    facts = json.loads(out)
    assert facts["rate"] == pytest.approx(1 / least) and facts["device_speed"] == 2e12 and facts["host_speed"] == 1e11


def test_a_cpu_has_no_other_memory(converted, capsys):
    """Experts in host memory are where they were: it is refused instead of counted."""
    with pytest.raises(UsageError, match=r'experts="host:1" is for devices with memory of their own; .*device_memory='):
        fit(converted["nvfp4"], experts="host:1")


# --------------------------------------------------------------------------------------------------------- the verdict


@pytest.fixture
def verdict(converted, no_programs, monkeypatch):
    """`fit` where a context is not rounded up, so that what is said to fit can be tried."""
    monkeypatch.setattr(fitting, "capacity_for", lambda cfg, tokens: tokens)

    def of(**options) -> Fit:
        return fit(converted["nvfp4"], **{"context": 100, "device_memory": "3MB", **options})

    return of


def test_the_largest_batch_fits_and_twice_that_does_not(verdict):
    largest = verdict().largest_batch
    assert largest > 4
    assert verdict(batch=largest).fits and not verdict(batch=2 * largest).fits
    assert verdict(batch=largest).largest_batch == largest


def test_the_longest_context_fits_and_one_token_more_does_not(verdict):
    longest = verdict(batch=4).longest_context
    assert 100 < longest < 4096
    assert verdict(batch=4, context=longest).fits and not verdict(batch=4, context=longest + 1).fits
    assert verdict(device_memory="1GB").longest_context == 4096


def test_where_nothing_fits(verdict):
    found = verdict(device_memory="1MB")
    assert not found.fits and found.largest_batch == found.longest_context == 0


def test_it_says_what_generate_says(verdict, converted, monkeypatch):
    """The cache that just fits is accepted with the weights loaded, and one row more is refused."""
    monkeypatch.setattr(fitting, "measure_prefill", lambda *_: 1000)
    found = verdict(batch=64, device_memory="1GB")
    weights = found.stored + found.dequantized
    one, left = found.cache // 64, found.total - weights
    assert found.cache + found.activations < left
    cfg = read_weight_shapes(converted["nvfp4"]).cfg
    monkeypatch.setattr(memory, "get_free_memory", lambda _: left)
    assert memory.plan_batch(cfg, 80, 1, 100, BF16, 0) == 64
    assert one == memory.compute_row_bytes(cfg, 100, BF16, 0)


def test_the_pages_of_an_engine(verdict, converted, monkeypatch):
    """What an engine of four rows accepts with the weights loaded, and not one page more; none where nothing fits."""
    monkeypatch.setattr(fitting, "measure_prefill", lambda *_: 1000)
    found = verdict(batch=4, device_memory="1GB")
    cfg = read_weight_shapes(converted["nvfp4"]).cfg
    monkeypatch.setattr(memory, "get_free_memory", lambda _: found.free - found.stored - found.dequantized)
    assert memory.plan_pages(cfg, 4, 1 << 30, found.pages, BF16, 0) == found.pages > 1000
    with pytest.raises(CapacityError, match=f"{found.pages + 1} pages"):
        memory.plan_pages(cfg, 4, 1 << 30, found.pages + 1, BF16, 0)
    assert verdict(batch=4, mesh="data=2", device_memory="1GB").pages > 2 * found.pages > 0
    assert verdict(device_memory="0.5MB").pages == 0


def test_rows_at_once_are_those_that_are_computed(small, monkeypatch):
    """Three rows are computed as four; a mesh splits them over "data" where that divides them."""
    one = memory.compute_row_bytes(small, 100, BF16, 0)
    monkeypatch.setattr(memory, "get_free_memory", lambda devices: 4 * one // devices)

    def at_once(rows, sizes=None, each=1):
        return memory.plan_batch(small, rows, each, 100, BF16, 0, sizes and ds.mesh(sizes))

    assert at_once(3) == 2
    assert at_once(5, "expert=2") == 1 and at_once(5, "data=2") == 2 and at_once(2, "data=2") == 2
    with pytest.raises(CapacityError, match="of 3 rows"):
        at_once(9, each=3)
    with pytest.raises(CapacityError, match="on each of 8 devices"):
        at_once(9, "model=8")


@pytest.mark.parametrize(("program", "draft"), [("prefill", 0), ("decode", 0), ("decode", 1)])
def test_layers_are_dequantized_one_after_the_other(tmp_path, program, draft):
    """A further layer takes less on the way than its matrices in bfloat16: they are not all there at once."""
    facts = json.loads(REAL.with_name("tiny.json").read_text()) | {"hidden_size": 512, "q_lora_rank": 256}

    def found(layers: int) -> WeightShapes:
        (tmp_path / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": layers}))
        return read_weight_shapes(tmp_path / "config.json", "nvfp4")

    attention = [leaf for leaf in found(3).table.values() if leaf.path.startswith(("layers.2.mla", "layers.2.indexer"))]
    plain = sum(2 * math.prod(leaf.shape) for leaf in attention)
    if program == "prefill":
        taken = [measure_prefill(Setup(found(layers), BF16, BF16, draft), 1, 16) for layers in (3, 4)]
    else:
        shallow, deep = (build_shallow(found(layers), BF16, 1) for layers in (2, 4))
        taken = [measure_decode(model, 1, 16, draft) for model in (shallow, deep)]
    assert taken[1] - taken[0] < plain


def test_devices_of_one_host_share_its_memory(converted, no_programs, monkeypatch):
    monkeypatch.setattr(host, "get_free_memory", lambda: 8_000_000)
    assert fit(converted["nvfp4"]).free == 8_000_000
    assert fit(converted["nvfp4"], mesh="expert=4,model=2").free == 1_000_000


# --------------------------------------------------------------------------------------------------------- the command


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["fit", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_table(converted, no_programs, capsys):
    code, out, _ = run(capsys, converted["nvfp4"], "--batch", 2, "--context", 100, "--draft", 1, "--cache-dtype", "fp8")
    assert code == 0
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names[1:7] == ["weights", "W^UK, W^UV", "cache", "activations", "total", "resident"]
    assert "on one device, cache in float8_e4m3fn, drafting 1" in out and "rows of 128 tokens" in out
    assert "fits: 2 rows of 100 tokens" in out and "not counted:" in out and "(cpu)" in out


def test_what_does_not_fit_ends_with_5(converted, no_programs, capsys):
    code, out, _ = run(capsys, converted["nvfp4"], "--device-memory", "1MB", "--mesh", "expert=4,model=2")
    assert code == 5
    assert (
        "on each of 8 devices" in out and "does not fit: 1 row" in out and "largest batch at this context: none" in out
    )


def test_weights_that_stay_on_disk(converted, small, no_programs, capsys, monkeypatch, tmp_path):
    """On a CPU only what is not mapped must be in memory; the rest costs time at each step, as the disk is fast."""
    whole = fit(converted["nvfp4"])
    assert whole.fits and whole.page_seconds == 0 and whole.mapped == whole.stored
    half = whole.total - whole.mapped // 2
    monkeypatch.setattr(memory, "get_free_memory", lambda devices: half)
    found = fit(converted["nvfp4"], disk_speed="1MB")
    read = read_weight_shapes(converted["nvfp4"]).count_step_bytes(1)
    assert found.fits and 0 < read < whole.stored and found.page_seconds == pytest.approx(read / 2 / 1e6, rel=1e-3)
    assert found.longest_context > 0 and fit(converted["nvfp4"]).page_seconds > 0, "the speed is measured"
    code, out, _ = run(capsys, converted["nvfp4"], "--disk-speed", "1MB")
    assert code == 0 and f"about {found.page_seconds:.1f} s of reading a token" in out
    (tmp_path / "config.json").write_text(json.dumps(small.to_dict()))
    assert fit(tmp_path / "config.json").page_seconds is None, "there is no disk to measure"
    monkeypatch.setattr(memory, "get_free_memory", lambda devices: whole.total - whole.mapped - 1)
    assert not fit(converted["nvfp4"]).fits
    assert fit(converted["nvfp4"], device_memory="1GB").mapped == 0, "of a device that is not here"


def test_bytes_of_a_step(converted, small):
    """Each row has its own experts; with very many rows all are read, and the embedding never is."""
    found = read_weight_shapes(converted["nvfp4"])
    stacked = {path for path, leaf in found.table.items() if leaf.stacked and not path.startswith("mtp.")}
    sizes = {path: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(found.weights[path])) for path in stacked}
    share = small.num_experts_per_tok / small.n_routed_experts
    few, many = found.count_step_bytes(1), found.count_step_bytes(10_000)
    assert many - few == pytest.approx((1 - share) * sum(sizes.values()))
    assert many < found.device_bytes({}, BF16)[0]


def test_json(converted, no_programs, capsys):
    code, out, _ = run(capsys, converted["nvfp4"], "--json", "--device-memory", "1GiB")
    facts = json.loads(out)
    assert code == 0 and facts["fits"] and facts["free"] == 2**30
    assert set(facts) == {field.name for field in dataclasses.fields(Fit)} | {"fits"}


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--context", "0"], 2, "context must be an integer from 1 to 4096"),
        (["--context", "4097"], 2, "context must be an integer from 1 to 4096"),
        (["--batch", "0"], 2, "batch must be an integer"),
        (["--draft", "17"], 2, "draft must be an integer from 0 to 16"),
        (["--mesh", "modle=2"], 2, "write for example expert=8,model=2"),
        (["--mesh", "expert=3"], 5, "does not divide"),
        (["--format", "fp8"], 2, "a format is for a config.json"),
        (["--device-memory", "lots"], 2, "invalid size 'lots'"),
    ],
)
def test_misuse(converted, no_programs, capsys, options, code, message):
    found, out, err = run(capsys, converted["nvfp4"], *options)
    assert (found, out) == (code, "") and message in err


def test_paths_that_are_no_model(converted, small, no_programs, capsys, tmp_path):
    """Not converted yet, damaged, absent, without the layer that is asked for."""
    code, _, err = run(capsys, converted["nvfp4"].parent / "originals" / "fp8")
    assert code == 3 and "run `dsv32 convert" in err
    assert run(capsys, tmp_path / "nowhere")[0] == 3
    (tmp_path / "config.json").write_text("{")
    assert run(capsys, tmp_path / "config.json")[0] == 3
    (tmp_path / "plain.json").write_text(json.dumps(dataclasses.replace(small, num_nextn_predict_layers=0).to_dict()))
    code, _, err = run(capsys, tmp_path / "plain.json", "--draft", 1)
    assert code == 2 and "needs the MTP head" in err


def test_a_manifest_with_other_leaves_is_refused(converted, tmp_path, capsys):
    manifest = Manifest.read(converted["bf16"])
    dataclasses.replace(
        manifest, leaves={path: leaf for path, leaf in manifest.leaves.items() if path != "norm_D"}
    ).write(tmp_path)
    code, _, err = run(capsys, tmp_path)
    assert code == 3 and "does not hold the parameters its config describes: norm_D" in err


def test_unknown_names_are_refused(converted):
    for options in ({"cache_dtype": "fp4"}, {"dtype": "fp8"}):
        with pytest.raises(UsageError, match="dtype is one of"):
            fit(converted["nvfp4"], **options)
    with pytest.raises(UsageError, match="the format is one of nvfp4, fp8, bf16"):
        read_weight_shapes(REAL, "int4")


def test_a_chunk_is_no_longer_than_the_cache(monkeypatch, single):
    """Prompts of a short context are read at once."""
    seen = []
    monkeypatch.setattr(temporaries, "count_temporary", lambda lowered: seen.append(lowered.in_avals) or 0)
    for capacity in (32, 4 * chunk_size()):
        measure_prefill(Setup(read_weight_shapes(single), BF16, BF16, 0), 1, capacity)
    assert {arguments[2].shape for arguments, _ in seen} == {(1, 32), (1, chunk_size())}


def test_a_folder_to_convert_has_a_config(tmp_path):
    """That is what can be asked of it."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"is not converted: .*: dsv32 fit {tmp_path}/config.json"):
        fit(tmp_path)
