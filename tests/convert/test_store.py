"""Arrays on disk: every dtype as it was, as the bytes of a file that Orbax reads too, and nothing that is not ours."""

import json
import os
import re
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from orbax.checkpoint import v1 as ocp

from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry
from dsv32_jax.checkpoint.reader import Reader
from dsv32_jax.checkpoint.writer import UNFINISHED, Writer
from dsv32_jax.errors import CheckpointError, OutputExistsError, StorageError, VerificationError

REPOSITORY = Path(__file__).parents[2]
RAW = np.random.default_rng(0).integers(0, 256, (8, 4, 32), np.uint8)
GROUP = {
    ("layers.1.ffn.w_EMD", "codes"): RAW,
    ("layers.1.ffn.w_EMD", "block_scale"): RAW[..., :4].view(ml_dtypes.float8_e4m3fn),
    ("layers.1.ffn.w_EMD", "tensor_scale"): np.full((8, 1, 1), 0.25, np.float32),
    ("layers.1.bias_D", "values"): RAW[0].view(ml_dtypes.bfloat16),
    ("layers.1.zeros_D", "values"): np.zeros(7, np.float16),
}
OTHER = {("norm_D", "values"): np.arange(5, dtype=np.float32)}


def write(folder: Path, group=GROUP, piece=lambda key, shape: shape, part: str = "00000") -> Reader:
    """`group` as a part of `folder`, and its reader."""
    folder.mkdir(parents=True, exist_ok=True)
    placed = Writer(folder, piece).save(part, group)
    leaves: dict[str, LeafEntry] = {}
    for key, array in group.items():
        entry = ArrayEntry(array.dtype.name, array.shape, "", placed[key])
        leaves.setdefault(key[0], LeafEntry("", {})).arrays[key[1]] = entry
    return Reader(folder, leaves)


def halves(axis: int):
    """Pieces of half of an axis."""
    return lambda key, shape: tuple(
        size // 2 if i == axis and size % 2 == 0 and len(shape) == 3 else size for i, size in enumerate(shape)
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_dtype_comes_back_bit_for_bit(axis, tmp_path):
    """Read, mapped, in runs of rows and in parts, whatever pieces it is stored in."""
    reader = write(tmp_path, piece=halves(axis))
    for key, array in GROUP.items():
        assert reader.read(key).dtype == array.dtype and reader.read(key).tobytes() == array.tobytes()
        mapped = reader.map(key)
        assert mapped.dtype == array.dtype and mapped.tobytes() == array.tobytes()
        assert b"".join(slab.tobytes() for slab in reader.slabs(key)) == array.tobytes()
        assert reader.read(key, 1, 3).tobytes() == array[1:3].tobytes()
    for index in ((slice(2, 7), slice(1, 3), slice(3, 29)), (slice(0, 8), slice(1, 2), slice(17, 21))):
        out = np.empty_like(RAW[index])
        reader.copy(("layers.1.ffn.w_EMD", "codes"), out, index)
        assert (out == RAW[index]).all() and (reader.map(("layers.1.ffn.w_EMD", "codes"), index) == RAW[index]).all()
    assert len(reader.entries["layers.1.ffn.w_EMD", "codes"].place.files) == (1 if axis == 0 else 2)


def test_a_file_is_the_bytes_of_an_array(tmp_path):
    """From offset 0 to its end; of a piece where the array is cut along another axis than the first."""
    key = ("layers.1.ffn.w_EMD", "codes")
    (file,) = write(tmp_path / "whole").entries[key].place.files
    assert (tmp_path / "whole" / file).read_bytes() == RAW.tobytes()
    first, second = write(tmp_path / "cut", piece=halves(2)).entries[key].place.files
    assert (tmp_path / "cut" / first).read_bytes() == RAW[..., :16].tobytes()
    assert (tmp_path / "cut" / second).read_bytes() == RAW[..., 16:].tobytes()


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_orbax_reads_a_part(axis, tmp_path):
    """Both its versions, without being told anything; a name that is a pattern elsewhere is a name here."""
    part = tmp_path / "a [0] *b" / "weights" / "00000"
    write(part.parents[1], piece=halves(axis))
    loads = (
        ocp.load,
        orbax.checkpoint.StandardCheckpointer().restore,
        orbax.checkpoint.PyTreeCheckpointer().restore,
    )
    for load in loads:
        tree = load(part)
        for (path, component), array in GROUP.items():
            node = tree
            for name in path.split("."):
                node = node[name]
            assert node[component].dtype == array.dtype and np.asarray(node[component]).tobytes() == array.tobytes()


def test_nothing_of_orbax_is_imported():
    """Its formats are written, its code is not used: neither public names nor private ones."""
    files = [*(REPOSITORY / "dsv32_jax").rglob("*.py"), *(REPOSITORY / "convert").rglob("*.py")]
    assert not [file for file in files if re.search(r"import.*(orbax|tensorstore)|_src", file.read_text())]


def test_maps_hold_no_files_open_and_cannot_be_written(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    reader = write(tmp_path)
    maps = [reader.map(key) for key in GROUP]
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="read-only"):
        maps[0][0] = 1
    assert all(map.ctypes.data % 4096 == 0 for map in maps)


def test_a_part_appears_whole(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    writer.save("00000", GROUP)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer.save("00001", OTHER)
    assert sorted(os.listdir(tmp_path / "weights")) == ["00000", "00001" + UNFINISHED]


def test_nothing_is_written_through_a_link(tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (out := tmp_path / "out").mkdir()
    (out / "weights").symlink_to(elsewhere)
    with pytest.raises(OutputExistsError, match="is a link"):
        Writer(out)
    (out / "weights").unlink()
    writer = Writer(out)
    (out / "weights" / ("00000" + UNFINISHED)).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="cannot be written"):
        writer.save("00000", OTHER)
    (out / "weights" / "00001").mkdir()
    with pytest.raises(StorageError, match="00001 exists"):
        writer.save("00001", OTHER)
    assert not os.listdir(elsewhere)


def test_a_write_that_was_lost_is_told(tmp_path, monkeypatch):
    """A part is read back before it counts."""
    fsync = os.fsync

    def lose(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.readlink(f"/proc/self/fd/{descriptor}").endswith("/c.0"):
            os.pwrite(descriptor, b"\x99", 3)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(
        StorageError, match=r"norm_D.values .weights/00000. was written but reads back as something els"
    ):
        Writer(tmp_path).save("00000", OTHER)


def damage(reader: Reader, how: str, tmp_path: Path) -> tuple[str, str]:
    """Do something to the file of an array; its name, and what is said of it."""
    (name,) = reader.entries["norm_D", "values"].place.files
    file, copy = reader.folder / name, tmp_path / "copy"
    content = file.read_bytes()
    if how == "folder on the way":
        copy.mkdir()
        (copy / file.name).write_bytes(content)
        file.unlink()
        (file.parent / "zarr.json").unlink()
        file.parent.rmdir()
        file.parent.symlink_to(copy)
        return str(Path(name).parent), f"{Path(name).parent} is a link"
    copy.write_bytes(content)
    file.unlink()
    if how == "short":
        file.write_bytes(content[:-1])
    elif how == "long":
        file.write_bytes(content + b"0")
    elif how == "link":
        file.symlink_to(copy)
    elif how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "unreadable":
        file.write_bytes(content)
        file.chmod(0)
    said = {"short": "has 19 bytes instead of 20", "long": "has 21 bytes instead of 20", "missing": "is missing"}
    said |= {"link": "is a link", "folder": "is not a file", "pipe": "is not a file", "unreadable": "cannot be read"}
    return name, f"{name} {said[how]}"


@pytest.mark.parametrize(
    "how", ["short", "long", "missing", "link", "folder", "pipe", "unreadable", "folder on the way"]
)
def test_what_is_not_the_file_that_was_written_is_refused(how, tmp_path):
    """Whoever asks, and at once: a pipe is not waited for."""
    if how == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    reader = write(tmp_path / "out", OTHER)
    _, said = damage(reader, how, tmp_path)
    reader = Reader(reader.folder, {"norm_D": LeafEntry("", {"values": reader.entries["norm_D", "values"]})})
    (problem,) = reader.find_problems()
    assert str(problem).startswith(said)
    for call in (
        reader.require_files,
        lambda: reader.map(("norm_D", "values")),
        lambda: reader.read(("norm_D", "values")),
    ):
        with pytest.raises((VerificationError, StorageError), match=re.escape(said)):
            call()


@pytest.mark.parametrize("name", ["/etc/passwd", "weights/../../etc/passwd", "../x", "", ".", "weights//x", "a\0b"])
def test_no_path_leads_out_of_the_folder(name, tmp_path):
    with pytest.raises(CheckpointError, match="is outside of the checkpoint"):
        Reader(tmp_path, {}).open_file(name)


def test_the_description_is_what_zarr_says(tmp_path):
    write(tmp_path, piece=halves(2))
    raw = json.loads((tmp_path / "weights" / "00000" / "layers.1.ffn.w_EMD.codes" / "zarr.json").read_text())
    assert raw["shape"] == [8, 4, 32] and raw["chunk_grid"]["configuration"]["chunk_shape"] == [8, 4, 16]
    assert raw["data_type"] == "uint8" and raw["codecs"] == [{"name": "bytes"}]
