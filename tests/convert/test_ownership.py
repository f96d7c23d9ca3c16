"""An output folder in which others left files and links: nothing is written through a link, only own parts deleted."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

import convert
from convert.export.export import export
from convert.write import journal
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.errors import OutputExistsError, VerificationError

from . import fakes

OPTIONS = {"group_bytes": 60_000}


class Stop(Exception):
    pass


def unfinished(source: Path, out: Path, parts: int = 2) -> Path:
    """A conversion that was stopped after some parts."""
    from dsv32_jax.checkpoint.writer import Writer

    save, saved = Writer.save, []

    def stop(self, part, group):
        if len(saved) == parts:
            raise Stop
        saved.append(part)
        return save(self, part, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "save", stop)
        with pytest.raises(Stop):
            convert.convert(source, out, **OPTIONS)
    return out


@pytest.fixture
def source(originals, tmp_path) -> Path:
    """A checkpoint with a tokenizer, which may be damaged."""
    folder = shutil.copytree(originals["bf16"], tmp_path / "hf")
    fakes.companions(folder)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_of_the_source_are_not_written_through_links(link, source, tmp_path):
    """A companion that is a link to the source's file is replaced by a copy."""
    before = contents(source)
    out = unfinished(source, tmp_path / "out")
    link(source / "tokenizer.json", out / "tokenizer.json")
    convert.convert(source, out, **OPTIONS)
    assert contents(source) == before
    assert not (out / "tokenizer.json").is_symlink() and not os.path.samefile(
        out / "tokenizer.json", source / "tokenizer.json"
    )
    assert (out / "tokenizer.json").read_bytes() == before[source / "tokenizer.json"]


@pytest.mark.parametrize("name", ["manifest.json.tmp", "journal.tmp", ".manifest.json.0123abcd.tmp"])
def test_planted_links_are_not_followed(name, source, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    out = unfinished(source, tmp_path / "out")
    (out / name).symlink_to(tmp_path / "thesis.tex")
    convert.convert(source, out, **OPTIONS)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("name", [".lock", "journal.jsonl"])
def test_files_that_are_written_in_place_are_no_hard_links(name, source, tmp_path):
    """Locking and noting change a file where it lies, so what it is linked to would change."""
    out = unfinished(source, tmp_path / "out")
    precious = (out / name).rename(tmp_path / "precious")
    precious.write_bytes(precious.read_bytes() + b"precious")
    os.link(precious, out / name)
    before = precious.read_bytes()
    with pytest.raises(OutputExistsError, match="hard link.*[Nn]othing was touched"):
        convert.convert(source, out, **OPTIONS)
    assert precious.read_bytes() == before


def test_a_manifest_that_was_edited_is_not_complete_already(source, tmp_path):
    """Its report is shown, and no digest in it covers that."""
    out = tmp_path / "out"
    convert.convert(source, out, **OPTIONS)
    raw = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(raw | {"report": {}}))
    with pytest.raises(VerificationError, match="manifest.json has changed"):
        convert.convert(source, out, **OPTIONS)


@pytest.mark.parametrize(
    "number, line, message",
    [
        (0, {"plan": 1, "stamps": {}}, "line 1.plan is 1, line 1.source is missing, line 1.basis is missing"),
        (0, [], r"line 1 is \[\]"),
        (1, {}, "line 2.part is missing, line 2.leaves is missing"),
        (1, {"begin": 7}, "line 2.begin is 7"),
        (1, "begin", "line 2 is 'begin'"),
        (1, {"part": "../x", "leaves": {}, "facts": {}, "outcomes": {}}, "a part is called '../x'"),
        (1, {"part": "7", "leaves": {"a": {}}, "facts": {}, "outcomes": {}}, "not an object with arrays"),
        (1, {"part": "7", "leaves": {}, "facts": {"x": "1"}, "outcomes": {}}, "line 2.facts.x is '1'"),
        (1, {"part": "7", "leaves": {}, "facts": {}, "outcomes": {"w": [1]}}, "squared_norm"),
    ],
)
def test_a_journal_of_another_form_is_damaged(number, line, message, source, tmp_path):
    """Each line has the right checksum, as of another version or by intent."""
    out = unfinished(source, tmp_path / "out")
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    lines[number] = journal.seal(line)
    (out / "journal.jsonl").write_text("".join(lines))
    with pytest.raises(OutputExistsError, match=f"journal.jsonl is damaged .*{message}.*Nothing was touched"):
        convert.convert(source, out, **OPTIONS)


def test_every_byte_of_a_journal_is_covered(source, tmp_path):
    """A changed one is damage, and a cut one is what a killed process leaves: fewer parts are known."""
    out = unfinished(source, tmp_path / "out", parts=1)
    raw, rng = (out / "journal.jsonl").read_bytes(), random.Random(3)
    whole = journal._read_lines(out / "journal.jsonl")
    for at in sorted(rng.sample(range(len(raw)), 1500)):
        (out / "journal.jsonl").write_bytes(raw[:at])
        if raw[:at].count(b"\n"):
            assert journal._read_lines(out / "journal.jsonl") == whole[: raw[:at].count(b"\n")]
        (out / "journal.jsonl").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        if at < len(raw) - 1:
            with pytest.raises(OutputExistsError, match="is damaged"):
                journal._read_lines(out / "journal.jsonl")


def test_a_journal_that_is_a_link_is_refused(source, tmp_path):
    """Lines would be added to the file it leads to."""
    out = unfinished(source, tmp_path / "out")
    (out / "journal.jsonl").rename(tmp_path / "precious")
    (out / "journal.jsonl").symlink_to(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    with pytest.raises(OutputExistsError, match="journal.jsonl is damaged .*Nothing was touched"):
        convert.convert(source, out, **OPTIONS)
    assert (tmp_path / "precious").read_bytes() == before


@pytest.mark.parametrize("journal", ["journal.jsonl", "journal.tmp", ".journal.jsonl.0123abcd.tmp"])
@pytest.mark.parametrize("linked", [False, True])
def test_folders_of_others_are_never_deleted(journal, linked, source, tmp_path):
    """A file called like the journal makes nobody the owner of what lies in weights/."""
    (others := tmp_path / "others").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    if linked:
        (out / "weights").symlink_to(others)
    else:
        others = out / "weights"
        others.mkdir()
    (others / "00007").mkdir()
    (others / "00007" / "thesis.tex").write_text("precious")
    (out / journal).touch()
    with pytest.raises(OutputExistsError, match="[Nn]othing was touched"):
        convert.convert(source, out, **OPTIONS)
    assert (others / "00007" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("name", ["00007", "backup", "00001.tar", "00001.backup"])
def test_what_the_journal_does_not_name_is_reported(name, source, tmp_path):
    """In an output that is the job's own, too."""
    out = unfinished(source, tmp_path / "out")
    (out / "weights" / name).mkdir()
    (out / "weights" / name / "thesis.tex").write_text("precious")
    if name == "00001.tar":
        shutil.rmtree(out / "weights" / name)
        (out / "weights" / name).write_text("precious")
    with pytest.raises(OutputExistsError, match=rf"did not write \({name}\); nothing was touched"):
        convert.convert(source, out, **OPTIONS)
    shutil.move(out / "weights" / name, tmp_path / "moved")
    assert convert.convert(source, out, **OPTIONS) == Manifest.read(out)


def test_a_link_in_place_of_the_weights_is_refused(source, tmp_path):
    out = unfinished(source, tmp_path / "out")
    (out / "weights").rename(tmp_path / "elsewhere")
    (out / "weights").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match="it is a link"):
        convert.convert(source, out, **OPTIONS)
    assert contents(tmp_path / "elsewhere") == before


def test_what_a_killed_run_left_is_removed(source, tmp_path):
    """A part that was begun and not finished, under its name or a temporary one, and files that were not renamed."""
    out = unfinished(source, tmp_path / "out", parts=1)
    lines = [json.loads(line)["line"] for line in (out / "journal.jsonl").read_text().splitlines()]
    begun = {line["begin"] for line in lines if "begin" in line}
    assert begun >= {"00000", "00001"} and [line["part"] for line in lines if "part" in line] == ["00000"]
    for name in ("00001", "00001.unfinished"):
        (out / "weights" / name).mkdir(exist_ok=True)
        (out / "weights" / name / "half").touch()
    (out / ".tokenizer.json.0123abcd.tmp").touch()
    manifest = convert.convert(source, out, **OPTIONS)
    assert manifest == Manifest.read(out)
    assert {file.name for file in out.iterdir()} == {
        ".lock", "manifest.json", "weights", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    assert not list(out.rglob("half"))


@pytest.mark.parametrize("name", ["thesis.tex", "model-00001-of-00001.safetensors", "config.json"])
def test_an_export_removes_only_files_that_it_recorded(name, converted, tmp_path):
    """A folder with the name of an unfinished export, and a lock file, need not be one."""
    aside = tmp_path / ".hf.unfinished"
    aside.mkdir()
    (aside / ".lock").touch()
    (aside / name).write_text("precious")
    with pytest.raises(OutputExistsError, match="nothing was touched"):
        export(converted["bf16"], tmp_path / "hf", "bf16")
    assert (aside / name).read_text() == "precious"


def test_an_export_is_not_written_through_a_link(converted, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".hf.unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match="is a link; nothing was touched"):
        export(converted["bf16"], tmp_path / "hf", "bf16")
    assert not list((tmp_path / "elsewhere").iterdir())
