"""Reading folders: whatever is wrong is an error that names it, and all of it at once."""

import contextlib
import json
import os
import shutil
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

from convert.read import safetensors
from convert.read.source import Source
from dsv32_jax.errors import CheckpointError, StorageError

from . import fakes

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def entry(**changes):
    return {"a": {**U8, **changes}}


MALFORMED = {
    "empty": (b"", "empty"),
    "short": (b"\x01\x00", "too short"),
    "length beyond the file": (fakes.file_bytes({}, length=1 << 40), "1099511627776"),
    "largest length": (b"\xff" * 8 + b"{}", "18446744073709551615"),
    "not JSON": (fakes.file_bytes(b"{nope}"), "not valid JSON"),
    "not UTF-8": (fakes.file_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "space before the brace": (fakes.file_bytes(b" {}"), "does not start with {"),
    "list": (fakes.file_bytes(b"[]"), "does not start with {"),
    "deep": (fakes.file_bytes(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "many lists": (fakes.file_bytes(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"), "2000002 lists, at most 400000"),
    "many objects": (fakes.file_bytes(b'{"a":[' + b"{}," * 2_000_000 + b"{}]}"), "2000002 objects, at most 200002"),
    "many numbers": (fakes.file_bytes(b'{"a":[' + b"999," * 4_000_000 + b"9]}"), "4000000 commas, at most 1200000"),
    "NaN": (fakes.file_bytes(b'{"a": NaN}'), "NaN"),
    "duplicate keys": (fakes.file_bytes(b'{"a": 1, "a": 2}'), "duplicate keys: 'a'"),
    "duplicate shape": (
        fakes.file_bytes(b'{"a": {"dtype": "U8", "shape": [4], "shape": [4]}}'),
        "duplicate keys: 'shape'",
    ),
    "duplicate beside a space": (
        fakes.file_bytes(b'{"a":{"dtype":"F32","dtype":"I32","shape" :[2],"data_offsets":[0,8]}}', b"12345678"),
        "duplicate keys: 'dtype'",
    ),
    "unknown dtype": (fakes.file_bytes(entry(dtype="F4"), b"1234"), "dtype 'F4'.*supported: BOOL"),
    "dtype is a number": (fakes.file_bytes(entry(dtype=3), b"1234"), "dtype 3"),
    "negative size": (fakes.file_bytes(entry(shape=[-4]), b"1234"), "shape"),
    "boolean size": (fakes.file_bytes(entry(shape=[True, 4]), b"1234"), "shape"),
    "fractional size": (fakes.file_bytes(entry(shape=[4.0]), b"1234"), "shape"),
    "minus zero": (fakes.file_bytes(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "shape"),
    "text size": (fakes.file_bytes(entry(shape="4"), b"1234"), "shape"),
    "rank 9": (fakes.file_bytes(entry(shape=[1] * 8 + [4]), b"1234"), "at most 8 sizes"),
    "overflow": (fakes.file_bytes(entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])), "too large"),
    "huge integer": (fakes.file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "bytes differ from shape": (fakes.file_bytes(entry(shape=[1_048_576]), b"1234"), "span 4 bytes.*needs 1048576"),
    "negative offset": (fakes.file_bytes(entry(data_offsets=[-4, 0]), b"1234"), "ascending"),
    "descending offsets": (fakes.file_bytes(entry(data_offsets=[4, 0]), b"1234"), "ascending"),
    "three offsets": (fakes.file_bytes(entry(data_offsets=[0, 2, 4]), b"1234"), "ascending"),
    "key missing": (fakes.file_bytes({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "exactly dtype"),
    "key surplus": (fakes.file_bytes(entry(more=1), b"1234"), "exactly dtype"),
    "entry is null": (fakes.file_bytes({"a": None}), "exactly dtype"),
    "hole at the start": (fakes.file_bytes(entry(data_offsets=[4, 8]), b"12345678"), "hole of 4 bytes before tensor a"),
    "overlap": (
        fakes.file_bytes({"a": U8, "b": {**U8, "data_offsets": [2, 6]}}, b"123456"),
        "tensor b overlaps the one before it by 2",
    ),
    "truncated": (fakes.file_bytes(entry(), b"12"), "truncated: 2 of"),
    "trailing bytes": (fakes.file_bytes(entry(), b"123456"), "2 bytes follow"),
    "long name": (fakes.file_bytes({"n" * 513: U8}, b"1234"), "513 bytes"),
    "escape sequence in a name": (fakes.file_bytes({"a\x1b[31m": U8}, b"1234"), r"a\\x1b.*cannot be printed"),
    "half a surrogate pair": (fakes.file_bytes(b'{"\\ud800":' + json.dumps(U8).encode() + b"}", b"1234"), "printed"),
    "metadata with numbers": (fakes.file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata is text": (fakes.file_bytes({"__metadata__": "pt"}), "__metadata__"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "HTML page": (b"<!DOCTYPE html><html></html>", "HTML"),
    "JSON error": (b'{"error": "Invalid credentials"}', "error message of the server"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(50), "gzip"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(50), "GGUF"),
    "zip": (b"PK\x03\x04" + bytes(50), "pickles are never opened"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_shard_is_refused_by_name(kind, tmp_path):
    content, message = MALFORMED[kind]
    (tmp_path / "model-1.safetensors").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        fakes.header_of(tmp_path / "model-1.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "model-1.safetensors" in str(caught.value)
    assert peak < len(content) + MOST_BYTES


MOST_BYTES = 100_000_000
"""Memory that reading a header may take beyond the size of the file, whatever it claims."""


def test_the_number_of_tensors_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    (tmp_path / "a.safetensors").write_bytes(fakes.file_bytes(dict.fromkeys("abcd")))
    with pytest.raises(CheckpointError, match="4 tensors, above the limit of 3"):
        fakes.header_of(tmp_path / "a.safetensors")


def test_the_number_of_tensors_of_all_shards_is_limited(folder, monkeypatch):
    count = len(Source(folder).tensors)
    monkeypatch.setattr("convert.read.source.MAX_TENSORS", count - 1)
    assert f"{count} tensors, above the limit of {count - 1}" in problems(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F8_E4M3", "F4", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 12), st.integers(-1, 12)) | JSON,
    }
)


@st.composite
def near_misses(draw):
    """A valid file, of which a few bytes, keys or entries are then changed."""
    entries, position = {}, 0
    for name in draw(st.lists(st.text(min_size=1, max_size=4), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = int(np.prod(shape, dtype=int))
        entries[name] = {"dtype": "I8", "shape": shape, "data_offsets": [position, position + count]}
        position += count
    entries |= draw(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON, max_size=1))
    raw = bytearray(fakes.file_bytes(json.dumps(entries, ensure_ascii=draw(st.booleans())).encode("utf-8", "replace")))
    raw += bytes(max(0, position + draw(st.sampled_from([0, 0, 0, 1, -1]))))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@settings(max_examples=400)
@given(raw=near_misses() | st.binary(max_size=60))
def test_what_is_accepted_the_safetensors_library_accepts_too(raw, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        found = fakes.header_of(file)
        with safe_open(file, "numpy") as reference:
            assert set(reference.keys()) == {tensor.name for tensor in found.tensors}
            for tensor in found.tensors:
                assert tuple(reference.get_slice(tensor.name).get_shape()) == tensor.shape


def test_every_dtype_is_read_as_it_was_written(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2, 48, np.uint8)
    arrays = {name: raw.view(dtype).reshape(2, -1) for name, dtype in fakes.DTYPES.items()}
    arrays["scalar"] = np.array(1.5, ml_dtypes.bfloat16)
    arrays["nothing"] = np.zeros((0, 3), np.float32)
    source = Source(fakes.write_checkpoint(tmp_path / "c", {}, arrays))
    for name, array in arrays.items():
        read = source.read(source.tensors[name])
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    monkeypatch.setattr("convert.read.source_file.CHUNK_BYTES", 7)
    pieces = list(source.read_chunks(source.tensors["F32"]))
    assert b"".join(pieces) == arrays["F32"].tobytes() and len(pieces) == 7


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(checkpoints["nvfp4"], tmp_path / "hf")


def problems(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        Source(folder)
    return str(caught.value)


def test_all_problems_of_all_shards_are_told_at_once(folder):
    first, second, third = sorted(folder.glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 100)
    second.unlink()
    third.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "config.json").unlink()
    text = problems(folder)
    assert "4 problems" in text
    for part in (
        "100 of",
        "missing: 1 of the 3 shards",
        "00002-of-00003.safetensors",
        "git lfs pull",
        "config.json is missing",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\b", "a\0b", "", "..", 3, "n" * 5000])
def test_the_index_cannot_name_files_outside(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has 1 invalid shard name" in problems(folder)


def test_missing_shards_are_one_problem(folder):
    """However many there are, with what downloads them."""
    index = {f"model.layers.{i}.x": f"model-{i:05}-of-00162.safetensors" for i in range(1, 163)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError) as caught:
        Source(folder)
    (line,) = [line for line in str(caught.value).splitlines() if "missing: " in line]
    assert "missing: 162 of the 162 shards that model.safetensors.index.json names, with 162 tensors" in line
    assert ": model-00001-of-00162.safetensors, ..., model-00162-of-00162.safetensors. `hf download" in line


def test_headers_win_over_the_index(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    scales = [name for name in index["weight_map"] if "scale" in name]
    for name in scales:
        del index["weight_map"][name]
    file.write_text(json.dumps(index))
    source = Source(folder)
    assert set(scales) <= set(source.tensors)
    assert any(f"does not list {len(scales)} tensors of the shards" in note for note in source.notes)
    index["weight_map"]["model.layers.9.x"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    assert "lists 1 tensor that no shard holds: model.layers.9.x" in problems(folder)


def test_a_tensor_in_two_shards_is_noted_where_equal_and_refused_where_not(folder):
    """Without an index nobody knows which one counts."""
    (folder / "model.safetensors.index.json").unlink()
    extra = shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-extra.safetensors")
    count = len(Source(folder).tensors)
    where = "stored in model-extra.safetensors and again in model-00001-of-00003.safetensors"
    assert any(where in note and "with equal content" in note for note in Source(folder).notes)
    with open(extra, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert f"1 tensor {where} with different content: " in problems(folder)
    fakes.write_shard(extra, {"model.norm.weight": np.ones(3, np.float32)})
    assert "with different content: model.norm.weight" in problems(folder) and count > 100


@pytest.mark.parametrize("storage", ["nvfp4", "compressed-tensors", "bf16"])
def test_the_files_of_a_complete_index_are_the_checkpoint(storage, checkpoints, tmp_path):
    """Another set of weights beside them is ignored, even if it is damaged, and said to be."""
    folder = shutil.copytree(checkpoints[storage], tmp_path / "hf")
    before = Source(folder)
    for file in checkpoints["fp8"].glob("*.safetensors"):
        shutil.copy(file, folder / file.name.replace("-of-00003", "-of-00004"))
    (folder / "model-old.safetensors").write_bytes(b"<html>")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs")
    source = Source(folder)
    assert source.tensors == before.tensors and source.identity == before.identity
    (note,) = set(source.notes) - set(before.notes)
    assert "ignored 5 files that model.safetensors.index.json does not name: model-00001-of-00004" in note


def test_files_that_an_incomplete_index_does_not_name_are_read(folder):
    """An index that was cut short does not decide."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    whole = Source(folder).tensors
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if "00003" not in shard}
    file.write_text(json.dumps(index))
    assert Source(folder).tensors == whole


def test_of_a_tensor_stored_twice_the_one_counts_that_the_index_names(folder):
    """Whichever shard is read first; and the note says which one it is."""
    file, name = folder / "model.safetensors.index.json", "model.norm.weight"
    index = json.loads(file.read_text())
    fakes.write_shard(folder / "model-00000.safetensors", {name: np.ones(3, np.float32)})
    index["weight_map"]["model.extra"] = "model-00000.safetensors"
    fakes.write_shard(
        folder / "model-00000.safetensors", {name: np.ones(3, np.float32), "model.extra": np.ones(1, np.float32)}
    )
    for shard in (index["weight_map"][name], "model-00000.safetensors"):
        index["weight_map"][name] = shard
        file.write_text(json.dumps(index))
        source = Source(folder)
        assert source.tensors[name].file.name == shard
        assert any(f"those that {file.name} names count ({name} in {shard})" in note for note in source.notes)
    index["weight_map"]["model.nothing"] = shard
    file.write_text(json.dumps(index))
    assert "that no shard holds: model.nothing (in model-00000.safetensors)" in problems(folder)


def test_strays_are_ignored_and_noted(folder):
    for name in (
        "consolidated.00.safetensors",
        "._model-00001-of-00003.safetensors",
        "x.incomplete",
        "golden.safetensors",
    ):
        (folder / name).write_bytes(b"whatever")
    assert any("ignored 4 non-shard files" in note for note in Source(folder).notes)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "config.json").write_text("{}")
    assert "pickles and GGUF are not supported: pytorch_model.bin" in problems(tmp_path)


def test_only_regular_files_are_opened(folder, tmp_path):
    shard = folder / "model-00001-of-00003.safetensors"
    blob = shard.rename(tmp_path / "blob")
    shard.symlink_to(blob)
    assert Source(folder).tensors
    shard.unlink()
    os.mkfifo(shard)
    assert "is not a regular file" in problems(folder)


def test_a_file_that_changes_while_it_is_read_is_noticed(folder):
    source = Source(folder)
    tensor = source.tensors["model.norm.weight"]
    os.utime(tensor.file)
    with pytest.raises(StorageError, match="changed while"):
        source.read(tensor)
    tensor.file.unlink()
    with pytest.raises(StorageError, match="cannot read"):
        source.read(tensor)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "hf_quant_config.json"])
def test_foreign_content_is_recognized_in_every_kind_of_file(name, folder):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert f"{name} is a git-lfs pointer" in problems(folder)


def test_a_length_is_little_endian(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack(">Q", 2) + b"{}")
    with pytest.raises(CheckpointError):
        fakes.header_of(tmp_path / "a")
