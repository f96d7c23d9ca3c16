"""The manifest: what is read back is what was written, and everything else is refused with its reason."""

import dataclasses
import json
import re

import pytest

from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry, Manifest, Place
from dsv32_jax.errors import CheckpointError

SHA = "0" * 64
PLACE = Place(("weights/00000/embed_VD.values/c.0.0", "weights/00000/embed_VD.values/c.0.1"), 1)
MANIFEST = Manifest(
    config={"hidden_size": 96},
    leaves={
        "embed_VD": LeafEntry("dense", {"values": ArrayEntry("bfloat16", (320, 96), SHA, PLACE)}),
        "mtp.embed_VD": LeafEntry("dense", {}, "embed_VD"),
    },
    source={"folder": "hf"},
    report={},
    versions={"python": "3.11"},
)


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
    raw = json.loads((tmp_path / "manifest.json").read_text())
    change(raw)
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        Manifest.read(tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.update(format_version=3), "Update dsv32_jax"),
        (lambda raw: raw.update(format_version="2"), "format_version is '2'"),
        (
            lambda raw: raw.update(format_version=1),
            "earlier version .* convert the original .*`dsv32 convert SRC NEW_FOLDER`",
        ),
        (lambda raw: raw.clear(), "format_version is None"),
        (lambda raw: (raw.pop("leaves"), raw.update(source=3)), "2 problems"),
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
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
        Manifest.read(tmp_path)
