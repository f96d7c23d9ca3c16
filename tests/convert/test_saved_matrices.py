"""A stopped conversion loses little work, also where one part takes many minutes: converted matrices are saved."""

import json
import re

import pytest

import convert
from convert.transform.requantize import Requantizer
from convert.write import saved_matrices
from convert.write.pipeline import Pipeline
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.errors import OutputExistsError
from dsv32_jax.system.progress import Progress

OPTIONS = {"to": "nvfp4", "scales": "four-over-six", "tensor_scales": "shared", "workers": 1}


class Stopped(Exception):
    """Stands for a kill."""


@pytest.fixture
def unfinished(originals, tmp_path, monkeypatch):
    """The folder of a conversion that was stopped when all matrices were converted and no part was on disk, and the
    names of the matrices."""
    monkeypatch.setattr(saved_matrices, "PATIENCE", -1.0)

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Pipeline, "_write", stop)
        convert.convert(originals["fp8"], tmp_path / "out", **OPTIONS)
    return tmp_path / "out", sorted(file.name for file in (tmp_path / "out" / "matrices").iterdir())


@pytest.fixture
def counted(monkeypatch):
    """The names of the matrices that are converted from now on."""
    names, convert_one = [], Requantizer._convert

    def count(self, stored, *rest):
        names.append(stored.name)
        return convert_one(self, stored, *rest)

    monkeypatch.setattr(Requantizer, "_convert", count)
    return names


def test_nothing_is_converted_twice(unfinished, originals, tmp_path, counted):
    """The result is that of a run that nobody stopped, progress begins with what is saved, and no file is left."""
    out, saved = unfinished
    seen: list[Progress] = []
    manifest = convert.convert(originals["fp8"], out, progress=seen.append, **OPTIONS)
    assert len(saved) > 20 and counted == [] and not (out / "matrices").exists()
    assert 0 < seen[0].saved < seen[-1].saved == seen[-1].total
    assert all(
        before.saved <= after.saved and before.done <= after.done for before, after in zip(seen, seen[1:], strict=False)
    )
    whole = convert.convert(originals["fp8"], tmp_path / "whole", **OPTIONS)
    assert manifest.digest == whole.digest and manifest.report == whole.report
    assert sorted(counted) == saved and not (tmp_path / "whole" / "matrices").exists()


@pytest.mark.parametrize("damage", ["header", "bytes", "cut", "source"])
def test_what_does_not_belong_is_converted_again(damage, unfinished, originals, counted):
    """A file that changed, and one that was made of other bytes of the source."""
    out, (first, *_) = unfinished
    file = out / "matrices" / first
    line, content = file.read_bytes().split(b"\n", 1)
    facts = json.loads(line)["line"]
    other = saved_matrices.seal({**facts, "sources": ["0" * 64, *facts["sources"][1:]]}).encode()
    damaged = {
        "header": line.replace(b"codes", b"coded") + b"\n" + content,
        "bytes": line + b"\n" + bytes([content[0] ^ 1]) + content[1:],
        "cut": line + b"\n" + content[:-1],
        "source": other + content,
    }
    file.write_bytes(damaged[damage])
    manifest = convert.convert(originals["fp8"], out, **OPTIONS)
    assert counted == [first] and Manifest.read(out).digest == manifest.digest


def test_quick_parts_are_written_once(originals, tmp_path, monkeypatch):
    """Without PATIENCE seconds between two parts there is no second copy."""
    monkeypatch.setattr(saved_matrices.SavingRequantizer, "_save", lambda *_: pytest.fail("saved"))
    convert.convert(originals["fp8"], tmp_path / "out", **OPTIONS)


def test_a_link_in_place_of_the_folder_is_refused(originals, tmp_path, unfinished):
    out, _ = unfinished
    (out / "matrices").rename(tmp_path / "elsewhere")
    (out / "matrices").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match=re.escape(f"{out / 'matrices'} is a link")):
        convert.convert(originals["fp8"], out, **OPTIONS)


@pytest.mark.parametrize("name", ["notes.txt", "folder", "link"])
def test_what_somebody_else_put_there_stays(name, originals, tmp_path, unfinished):
    """The folder is not used while it holds a file, a folder or a link that no conversion made."""
    out, (first, *_) = unfinished
    before = len(list((out / "matrices").iterdir()))
    if name == "link":
        (out / "matrices" / first).rename(tmp_path / "own")
        (out / "matrices" / first).symlink_to(tmp_path / "own")
    else:
        before += 1
        (out / "matrices" / name).mkdir() if name == "folder" else (out / "matrices" / name).write_text("mine")
    with pytest.raises(OutputExistsError, match="1 entry that no conversion saved: .*nothing was touched"):
        convert.convert(originals["fp8"], out, **OPTIONS)
    assert len(list((out / "matrices").iterdir())) == before


def test_a_full_disk_only_costs_time(originals, tmp_path, monkeypatch):
    """The copies are not the conversion."""
    monkeypatch.setattr(saved_matrices, "PATIENCE", -1.0)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_matrices, "replace_file", refuse)
    convert.convert(originals["fp8"], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out" / "matrices").exists()
