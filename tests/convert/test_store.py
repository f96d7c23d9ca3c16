"""Arrays on disk: every dtype as it was, in any sharding, only what is asked for, never a silent cast."""

import logging
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv32_jax.checkpoint import chunks, store
from dsv32_jax.checkpoint.arrays import Arrays
from dsv32_jax.checkpoint.store import Reader, Writer
from dsv32_jax.errors import CheckpointError

RAW = np.random.default_rng(0).integers(0, 256, (8, 4, 32), np.uint8)
GROUP = {
    ("layers.1.ffn.w_EMD", "codes"): RAW,
    ("layers.1.ffn.w_EMD", "block_scale"): RAW[..., :4].view(ml_dtypes.float8_e4m3fn),
    ("layers.1.ffn.w_EMD", "tensor_scale"): np.full((8, 1, 1), 0.25, np.float32),
    ("layers.1.bias_D", "values"): RAW[0].view(ml_dtypes.bfloat16),
}
OTHER = {("norm_D", "values"): np.arange(5, dtype=np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    writer = Writer(folder)
    writer.save("00000", GROUP)
    writer.save("00001", OTHER)
    writer.finish()
    return folder


def test_every_dtype_comes_back_bit_for_bit(folder):
    arrays = GROUP | OTHER
    read = Reader(folder).read(dict.fromkeys(arrays))
    for key, array in arrays.items():
        assert read[key].dtype == array.dtype and np.asarray(read[key]).tobytes() == array.tobytes()


def test_arrays_go_where_they_are_asked_for(folder):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "model"))
    key = ("layers.1.ffn.w_EMD", "codes")
    for spec in (PartitionSpec("expert"), PartitionSpec(None, "model"), PartitionSpec(("expert", "model"))):
        target = jax.ShapeDtypeStruct(RAW.shape, RAW.dtype, sharding=NamedSharding(mesh, spec))
        read = Reader(folder).read({key: target})
        assert set(read) == {key} and read[key].sharding == target.sharding
        assert np.asarray(read[key]).tobytes() == RAW.tobytes()


def test_what_is_not_as_expected_is_refused(folder):
    wrong = {
        ("layers.1.ffn.w_EMD", "codes"): jax.ShapeDtypeStruct(RAW.shape, np.int8),
        ("norm_D", "values"): jax.ShapeDtypeStruct((6,), np.float32),
    }
    with pytest.raises(CheckpointError, match="2 arrays .*codes is stored as uint8 .*, int8 .* is expected"):
        Reader(folder).read(wrong)
    with pytest.raises(CheckpointError, match="lacks 1 arrays: nothing.values"):
        Reader(folder).read({("nothing", "values"): None, ("norm_D", "values"): None})


def test_a_part_is_replaced_whole_and_leftovers_go(tmp_path):
    writer = Writer(tmp_path)
    writer.save("00000", GROUP)
    (tmp_path / "weights" / f"00001{store.UNFINISHED}-123").mkdir()
    assert len(Reader(tmp_path).stored) == len(GROUP)
    writer = Writer(tmp_path)
    writer.save("00000", OTHER)
    assert os.listdir(tmp_path / "weights") == ["00000"] and writer.has("00000") and not writer.has("00001")
    assert set(Reader(tmp_path).stored) == set(OTHER)


def test_damage_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reader(tmp_path)
    Writer(tmp_path).save("00000", OTHER)
    reader = Reader(tmp_path)
    for file in (tmp_path / "weights").rglob("d/*"):
        os.truncate(file, 1)
    with pytest.raises(CheckpointError, match="damaged"):
        reader.read(dict.fromkeys(OTHER))
    for file in (tmp_path / "weights").rglob("_METADATA"):
        file.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        reader.read(dict.fromkeys(OTHER))
    for file in (tmp_path / "weights").rglob("manifest.ocdbt"):
        file.write_text("{")
    with pytest.raises(CheckpointError, match="damaged.*00000"):
        Reader(tmp_path)


def test_large_stacks_are_chunked_by_expert(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "LARGEST", 512)
    monkeypatch.setattr(chunks, "SMALLEST", 64)
    Writer(tmp_path).save("00000", GROUP)
    found = {component: info.chunk for (_, component), info in Arrays(tmp_path).stored.items()}
    assert found == {"codes": (1, 4, 32), "block_scale": (8, 4, 4), "tensor_scale": (8, 1, 1), "values": (4, 16)}
    assert (
        np.asarray(Reader(tmp_path).read(dict.fromkeys(GROUP))[("layers.1.ffn.w_EMD", "codes")]).tobytes()
        == RAW.tobytes()
    )


def test_orbax_keeps_quiet(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO):
        Writer(tmp_path).save("00000", GROUP)
        Reader(tmp_path).read(dict.fromkeys(GROUP))
    assert not [record for record in caplog.records if record.name == "absl"]
    assert capfd.readouterr() == ("", "")
