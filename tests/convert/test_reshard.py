"""Other files, the same content: each device reads its own bytes, and any mesh reads any checkpoint."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.export.reshard import reshard
from convert.inspect.folder_tree import inspect
from convert.plan import limits
from convert.verify.verify import verify
from dsv32_jax import cli
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry, Manifest
from dsv32_jax.checkpoint.reader import Reader
from dsv32_jax.checkpoint.writer import Writer
from dsv32_jax.config import Config
from dsv32_jax.errors import CapacityError, OutputExistsError, UsageError, VerificationError
from dsv32_jax.layout import leaves
from dsv32_jax.parallel import partition
from dsv32_jax.system.progress import format_size

REPOSITORY = Path(__file__).parents[2]
OTHER_PYTHON = os.environ.get("OTHER_PYTHON", "")
"""A Python of another version with another JAX, given by hand or by .ci/run."""

MESH = {"expert": 4, "model": 2}


@pytest.fixture(scope="module")
def resharded(converted, tmp_path_factory) -> Path:
    """The NVFP4 checkpoint, laid out for MESH."""
    folder = tmp_path_factory.mktemp("resharded") / "out"
    reshard(converted["nvfp4"], folder, MESH)
    return folder


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["reshard", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_dry_run_writes_nothing(converted, resharded, tmp_path, capsys, monkeypatch):
    """It says what the reshard says, and refuses what the reshard refuses."""
    words = [converted["nvfp4"], tmp_path / "out", "--mesh", "expert=4"]
    code, out, _ = run(capsys, *words, "--dry-run")
    assert code == 0 and out.startswith("planned ") and not list(tmp_path.iterdir())
    assert run(capsys, *words)[:2] == (0, out.replace("planned", "written"))
    assert run(capsys, *words, "--dry-run")[:2] == (0, out.replace("planned ", "complete"))
    assert run(capsys, words[0], resharded, "--dry-run")[0] == 6
    assert run(capsys, words[0], tmp_path / "other", "--mesh", "expert=3", "--dry-run")[0] == 5
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: (10**13, 0, 1))
    assert run(capsys, words[0], tmp_path / "other", "--dry-run")[0] == 5 and not (tmp_path / "other").exists()


def test_the_content_is_the_same_and_the_files_are_not(converted, resharded, small):
    """A piece of a device is a file, or a run of rows of one."""
    before, after = Manifest.read(converted["nvfp4"]), Manifest.read(resharded)
    assert after.digest == before.digest and after.storage["mesh"] == MESH and not before.storage["mesh"]
    assert verify(resharded).lossless
    assert "laid out for the mesh expert=4, model=2" in inspect(resharded).notes
    table = {leaf.path: leaf for leaf in leaves(Config.from_dict(after.config))}
    cut = 0
    for path, leaf in after.leaves.items():
        for name, array in leaf.arrays.items():
            device = partition.shard_shape(MESH, table[path], array.shape)
            assert array.piece == (array.shape[0], *device[1:]), (path, name)
            cut += len(array.place.files) > 1
    assert cut > 15
    codes = after.leaves["layers.1.ffn.w_down_EDM"].arrays["codes"]
    assert codes.shape == (8, 96, 32) and codes.piece == (8, 96, 16)
    assert {len(array.place.files) for leaf in before.leaves.values() for array in leaf.arrays.values()} == {1}


@pytest.mark.parametrize("axis", ["expert", "model"])
def test_a_device_reads_its_own_bytes_and_no_others(axis, small, tmp_path, monkeypatch):
    """An eighth of a stack is an eighth of the bytes; of a stack laid out for one device a piece is read by a map."""
    leaf = next(leaf for leaf in leaves(small) if leaf.path == "layers.1.ffn.w_gate_EMD")
    leaf = leaf._replace(shape=(8, 512, 512))
    codes, key = np.random.default_rng(0).integers(0, 256, leaf.shape, np.uint8), (leaf.path, "codes")
    index = (slice(3, 4), slice(0, 512), slice(0, 512)) if axis == "expert" else np.s_[0:8, 64 * 3 : 64 * 4, 0:512]
    count, preadv = [0], os.preadv

    def counted(descriptor, buffers, offset):
        count[0] += (done := preadv(descriptor, buffers, offset))
        return done

    def read(folder: str, mesh: dict[str, int]) -> int:
        (tmp_path / folder).mkdir()
        writer = Writer(tmp_path / folder, partition.make_shard_shape(mesh, [leaf]))
        entry = ArrayEntry("uint8", codes.shape, "", writer.save("00000", {key: codes})[key])
        reader, out = (
            Reader(tmp_path / folder, {leaf.path: LeafEntry("", {"codes": entry})}),
            np.empty_like(codes[index]),
        )
        count[0] = 0
        reader.copy(key, out, index)
        assert (out == codes[index]).all()
        return count[0]

    monkeypatch.setattr(os, "preadv", counted)
    assert read("cut", {axis: 8}) == codes.nbytes // 8
    assert read("whole", {}) == (codes.nbytes // 8 if axis == "expert" else 0)


LOAD = """
import hashlib, json, sys
import jax, numpy as np
import dsv32_jax as ds
from jax.sharding import AxisType
result = {}
for folder in sys.argv[1:]:
    count = jax.device_count()
    for sizes in {1: [None], 2: [{"expert": 2}], 4: [{"expert": 2, "model": 2}], 8: [{"expert": 4, "model": 2}]}[count]:
        mesh = sizes and jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        model = ds.load(folder, mesh=mesh, verify="full")
        leaves = jax.tree_util.tree_leaves_with_path(model)
        digest = hashlib.sha256()
        for path, leaf in leaves:
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        split = sum(not leaf.sharding.is_fully_replicated for _, leaf in leaves)
        result[folder + json.dumps(sizes)] = [digest.hexdigest(), split]
print(json.dumps(result))
"""


def loaded(python: str, devices: int, *folders: Path) -> dict[str, list]:
    """By folder and mesh, the digest of the model that a process of its own loads, and how many leaves it splits."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment = {**os.environ, **flags, "PYTHONPATH": str(REPOSITORY)}
    command = [python, "-c", LOAD, *map(str, folders)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_any_checkpoint_loads_on_any_number_of_devices(converted, resharded):
    """On 1, 2, 4 and 8 devices, each in a process of its own: the same model, bit for bit."""
    digests = set()
    with ThreadPoolExecutor() as pool:
        counts = (1, 2, 4, 8)
        models = pool.map(lambda count: loaded(sys.executable, count, converted["nvfp4"], resharded), counts)
        for count, found in zip(counts, models, strict=True):
            for digest, split in found.values():
                digests.add(digest)
                assert (split >= 18) == (count > 1)
    assert len(digests) == 1


CONVERT = """
import sys
import convert
print(convert.convert(*sys.argv[1:]).digest)
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="OTHER_PYTHON=path names no other Python with another JAX")
def test_other_python_reads_what_this_one_wrote_and_the_reverse(converted, resharded, originals, small, tmp_path):
    """On 1, 2, 4 and 8 devices too; in FP8 with whole blocks, which the meshes do not cut."""
    other = os.path.abspath(OTHER_PYTHON)
    version = "import jax, sys; print(jax.__version__, *sys.version_info[:2])"
    versions = [subprocess.run([python, "-c", version], capture_output=True) for python in (sys.executable, other)]
    assert len({done.stdout for done in versions}) == 2 and not any(done.returncode for done in versions)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    whole = tmp_path / "whole"
    random_checkpoint.write(whole, dataclasses.replace(small, intermediate_size=256), "fp8")
    convert.convert(whole, tmp_path / "here")
    cases = {originals["nvfp4"]: (converted["nvfp4"], resharded), whole: (tmp_path / "here",)}
    for source, folders in cases.items():
        theirs = tmp_path / f"theirs-{source.name}"
        command = [other, "-c", CONVERT, str(source), str(theirs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == Manifest.read(folders[0]).digest
        ((expected, _),) = loaded(sys.executable, 1, theirs).values()
        for count in (1, 2, 4, 8):
            assert {digest for digest, _ in loaded(other, count, *folders).values()} == {expected}


def test_a_mesh_that_does_not_divide_is_a_table_before_anything_is_read(converted, tmp_path, capsys):
    code, out, err = run(capsys, converted["nvfp4"], tmp_path / "out", "--mesh", "expert=3,model=4")
    assert code == 5 and not out and not (tmp_path / "out").exists()
    assert "the mesh expert=3, model=4 does not divide" in err and "Nothing was read" in err
    assert "   1 x layers.*.ffn.w_gate_EMD: E 8 over expert=3 (possible: 1, 2, 4, 8)\n" in err
    assert "   1 x layers.*.ffn.w_down_DF: F 160 in 10 blocks over model=4 (possible: 1, 2, 5, 10)\n" in err
    assert "does not divide 7 parameters evenly" in err and "w_o_DHP" not in err
    with pytest.raises(CapacityError, match=r"   2 x layers.\*.mla.w_uk_HNC: H 4 over model=8 \(possible: 1, 2, 4\)"):
        reshard(converted["fp8"], tmp_path / "out", {"model": 8})
    with pytest.raises(CapacityError, match=r"ffn.w_down_EDM: M 64 in 4 blocks over model=8"):
        reshard(converted["nvfp4"], tmp_path / "out", {"model": 8})


@pytest.mark.parametrize("text", ["", "expert", "expert=0", "expert=2,expert=2", "modle=2", "model=-1", "model=1e3"])
def test_a_mesh_that_is_not_understood_is_refused(text):
    with pytest.raises(UsageError, match="write for example expert=8,model=2"):
        partition.parse_mesh(text)


def test_a_mesh_as_people_write_it():
    assert partition.parse_mesh("expert=8, model=2") == {"expert": 8, "model": 2}
    assert partition.parse_mesh("data=1") == {"data": 1}


def test_the_command_says_what_was_written(converted, tmp_path, capsys):
    code, out, _ = run(capsys, converted["bf16"], tmp_path / "out", "--mesh", "expert=8")
    assert code == 0
    manifest = Manifest.read(converted["bf16"])
    size = format_size(sum(array.nbytes for leaf in manifest.leaves.values() for array in leaf.arrays.values()))
    assert out == f"written    {tmp_path / 'out'}: {size}\ndigest     {manifest.digest}\n"
    before = (tmp_path / "out" / "manifest.json").stat()
    assert run(capsys, converted["bf16"], tmp_path / "out", "--mesh", "expert=8")[0] == 0
    after = (tmp_path / "out" / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".lock", "manifest.json", "weights"}


def test_other_content_is_never_touched(converted, tmp_path, capsys):
    reshard(converted["bf16"], tmp_path / "out", "expert=8")
    with pytest.raises(OutputExistsError, match=r"nothing was touched.*--mesh: expert was 8, now 4"):
        reshard(converted["bf16"], tmp_path / "out", "expert=4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    assert run(capsys, converted["bf16"], tmp_path / "full")[0] == 6
    with pytest.raises(UsageError, match="separate folders"):
        reshard(converted["bf16"], converted["bf16"])


def test_a_finished_output_that_is_damaged_is_told(converted, tmp_path):
    """Of a reshard as of a conversion: the manifest alone is no proof that the work is done."""
    reshard(converted["bf16"], tmp_path / "out")
    file = next((tmp_path / "out" / "weights").rglob("c.*"))
    file.unlink()
    with pytest.raises(VerificationError, match=f"holds this conversion and is damaged: .*{file.name} is missing"):
        reshard(converted["bf16"], tmp_path / "out")


def test_it_continues_where_it_stopped(converted, originals, tmp_path, monkeypatch):
    convert.convert(originals["nvfp4"], tmp_path / "parts", group_bytes=60_000)
    save, saved = Writer.save, []

    def stop(self, part, group):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(part)
        return save(self, part, group)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            reshard(tmp_path / "parts", tmp_path / "out", MESH)
    first = list(saved)
    monkeypatch.setattr(Writer, "save", lambda self, part, group: saved.append(part) or save(self, part, group))
    manifest = reshard(tmp_path / "parts", tmp_path / "out", MESH)
    assert saved[2:] and not set(first) & set(saved[2:])
    assert manifest.digest == Manifest.read(converted["nvfp4"]).digest and verify(tmp_path / "out").lossless


def test_damage_is_not_copied(converted, tmp_path):
    folder = shutil.copytree(converted["bf16"], tmp_path / "copy")
    file = max((folder / "weights").rglob("c.*"), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"\(weights/0000[0-9]\) has changed"):
        reshard(folder, tmp_path / "out", MESH)
    assert not (tmp_path / "out" / "manifest.json").exists()
    shutil.rmtree(folder / "weights" / "00000")
    with pytest.raises(VerificationError, match="embed_VD.values/c.0.0 is missing"):
        reshard(folder, tmp_path / "other", MESH)


def test_real_experts_are_files_of_all_of_them(real):
    """Of a matrix that a mesh cuts, a file for each piece."""
    table = {leaf.path: leaf for leaf in leaves(real)}
    leaf = table["layers.3.ffn.w_down_EDM"]
    for mesh, piece in (({}, (256, 7168, 1024)), ({"expert": 8}, (32, 7168, 1024)), (MESH, (64, 7168, 512))):
        assert partition.shard_shape(mesh, leaf, (256, 7168, 1024)) == piece
    stored = [(leaf, leaf.shape) for leaf in table.values()]
    partition.check_divisible({"expert": 8, "model": 16, "data": 4}, stored)
