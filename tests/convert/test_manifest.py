"""The manifest: what is read back is what was written, and everything else is refused with its reason."""

import dataclasses
import os
import re

import pytest

from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry, Manifest, Place, seal
from dsv32_jax.errors import CheckpointError, VerificationError
from dsv32_jax.system.locks import lock_folder

from . import fakes

SHA = "0" * 64
PLACE = Place(("weights/00000/embed_VD.values/c.0.0", "weights/00000/embed_VD.values/c.0.1"), 1)
LEAVES = {
    "embed_VD": LeafEntry("dense", {"values": ArrayEntry("bfloat16", (320, 96), SHA, PLACE)}),
    "mtp.embed_VD": LeafEntry("dense", {}, "embed_VD"),
}
MANIFEST = fakes.manifest({"hidden_size": 96}, LEAVES)


def test_it_is_read_as_it_was_written(tmp_path):
    MANIFEST.write(tmp_path)
    read = Manifest.read(tmp_path)
    assert read == MANIFEST
    entry = read.leaves["embed_VD"].arrays["values"]
    assert (entry.place, entry.piece, entry.nbytes, entry.part) == (PLACE, (320, 48), 320 * 96 * 2, "00000")
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_the_digest_is_that_of_the_content():
    moved = dataclasses.replace(MANIFEST, source={"folder": "elsewhere"}, versions={}, report={"notes": ["x"]})
    assert moved.digest == MANIFEST.digest
    assert dataclasses.replace(MANIFEST, config={"hidden_size": 97}).digest != MANIFEST.digest
    assert dataclasses.replace(MANIFEST, leaves={}).digest != MANIFEST.digest


def test_a_folder_without_one_is_called_what_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Manifest.read(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a converted checkpoint"):
        Manifest.read(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="run `dsv32 convert"):
        Manifest.read(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        Manifest.read(tmp_path)


def place(raw: dict, file: str) -> None:
    """Let the first piece of an array lie in `file`."""
    raw["leaves"]["embed_VD"]["arrays"]["values"]["files"][0] = file


def changed(change, tmp_path) -> str:
    """What reading says after `change` was made to the JSON."""
    MANIFEST.write(tmp_path)
    fakes.edit_manifest(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        Manifest.read(tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.update(format_version=4), "Update dsv32_jax"),
        (lambda raw: raw.update(format_version="3"), "format_version is '3'"),
        (
            lambda raw: raw.update(format_version=1),
            "earlier version .* convert the original .*`dsv32 convert SRC NEW_FOLDER`",
        ),
        (lambda raw: raw.update(format_version=2), "earlier version .* convert the original"),
        (lambda raw: raw.pop("format_version"), "format_version is None"),
        (lambda raw: (raw.pop("leaves"), raw.update(source=3)), "2 problems"),
        (
            lambda raw: (raw["source"]["files"].update(a={"size": "1"}), raw["storage"].update(mesh=[])),
            r"3 problems.*manifest.source.files.a.size is '1'.*files.a.header_sha256 is missing.*storage.mesh is \[\]",
        ),
        (lambda raw: raw["report"].update(ignored={"x": True}), "manifest.report.ignored.x is True"),
        (lambda raw: raw["report"]["notes"].append(None), r"manifest.report.notes\[0\] is None"),
        (lambda raw: raw["report"].pop("errors"), "manifest.report.errors is missing"),
        (lambda raw: raw["versions"].update(jax=0.1), "manifest.versions.jax is 0.1"),
        (lambda raw: raw["storage"].update(files=[]), r"manifest.storage.files is \[\]"),
        (lambda raw: raw["leaves"].update(x=3), "leaf x: not an object"),
        (lambda raw: raw["leaves"]["embed_VD"].update(format="int4"), "unknown format .int4."),
        (lambda raw: raw["leaves"]["embed_VD"].update(format="nvfp4"), "nvfp4 with the arrays values"),
        (lambda raw: raw["leaves"]["mtp.embed_VD"].update(same_as="nowhere"), "'nowhere' is not a stored leaf"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].update(shape=[-1, 96]), "invalid array"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].update(sha256="00"), "invalid array"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].update(nbytes=1), "invalid array"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].update(axis=0), "invalid array"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].update(axis=5), "invalid array"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].pop("files"), "invalid array"),
        (lambda raw: raw["leaves"]["embed_VD"]["arrays"]["values"].update(files=[3, 4]), "invalid array"),
        (lambda raw: place(raw, "weights/../../etc/passwd"), "invalid array"),
        (lambda raw: place(raw, "/etc/passwd"), "invalid array"),
        (lambda raw: place(raw, PLACE.files[1]), "c.0.1 holds 2 arrays"),
        (lambda raw: raw["storage"].update(files={"../x": [3, SHA]}), "storage of ../x"),
        (lambda raw: raw["storage"].update(files={"x": [3, None]}), "storage of x"),
        (lambda raw: raw["config"].update(hidden_size=97), "digest does not match"),
        (lambda raw: raw["config"].update(hidden_size=float("nan")), "its config holds NaN or infinity"),
    ],
)
def test_a_malformed_one_is_refused(change, message, tmp_path):
    assert re.search(message, changed(change, tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format_version": 1}', "[" * 100_000])
def test_a_torn_one_is_refused(text, tmp_path):
    """Everything is checked against it, so it is damage whoever reads it."""
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(VerificationError, match="manifest.json has changed since it was written"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_bytes(seal(text.encode()))
    with pytest.raises(CheckpointError, match="manifest.json is no manifest"):
        Manifest.read(tmp_path)


def test_one_of_the_first_format_is_told(tmp_path):
    """It has no seal."""
    (tmp_path / "manifest.json").write_text('{\n "format_version": 1,\n "leaves": {}\n}\n')
    with pytest.raises(CheckpointError, match="An earlier version wrote it.*dsv32 convert SRC NEW_FOLDER"):
        Manifest.read(tmp_path)


def test_a_folder_that_another_process_writes_is_called_so(tmp_path):
    with lock_folder(tmp_path), pytest.raises(CheckpointError, match=rf"another process \(pid {os.getpid()} on .*Wait"):
        Manifest.read(tmp_path)
    with pytest.raises(CheckpointError, match="is not a converted checkpoint"):
        Manifest.read(tmp_path)
