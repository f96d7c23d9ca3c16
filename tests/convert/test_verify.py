"""Verification: what was written is recognized, whatever else is named, and a flipped bit never loads."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert
import dsv32_jax as ds
from convert.export.export import export
from convert.name_folding import fold_names
from convert.read.provenance import Provenance
from convert.verify.verify import verify
from dsv32_jax import cli
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.checksums import find_changed_files, find_damage
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.checkpoint.reader import Reader
from dsv32_jax.errors import CheckpointError, UsageError, VerificationError

from . import fakes
from .conftest import STORAGES


@pytest.fixture(scope="module")
def fragile(converted, tmp_path_factory) -> Path:
    """A converted checkpoint whose bits are flipped, and flipped back."""
    return shutil.copytree(converted["nvfp4"], tmp_path_factory.mktemp("fragile") / "out")


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """A converted checkpoint that may be damaged."""
    return shutil.copytree(converted["nvfp4"], tmp_path / "copy")


def flip(file: Path, at: int, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("storage", STORAGES)
def test_a_conversion_that_keeps_formats_is_proven_lossless(storage, converted, originals, capsys):
    code, out, _ = run(capsys, "verify", converted[storage], "--against", originals[storage])
    count, source = len(fakes.load(originals[storage])), originals[storage]
    assert code == 0
    assert (
        f"lossless: {count} source tensors reconstructed, equal to {source}\nverified   {converted[storage]} (full)"
        in out
    )
    assert "\nchanged " not in "\n" + out and "\nignored " not in "\n" + out
    assert "B/s" in out and "SHA-256" in out


def test_what_was_requantized_is_listed(converted, originals, capsys):
    code, out, _ = run(capsys, "verify", converted["quantized"])
    assert code == 0 and "not lossless: " in out
    assert "changed    8 x mlp.experts.*.down_proj.weight (layers 1): fp8 became nvfp4" in out
    assert "changed    2 x self_attn.o_proj.weight (layers 0-1): fp8 became nvfp4" in out
    assert "q_a_proj" not in out
    report = verify(converted["quantized"], against=originals["fp8"])
    kept = {name for name in fakes.load(originals["fp8"]) if not any(f".{part}_proj" in name for part in KEPT_NOT)}
    assert report.proven >= len(kept) and report.lossless is False


KEPT_NOT = ("gate", "up", "down", "o")


def test_what_was_dequantized_and_ignored_is_listed(originals, small, tmp_path):
    """Heads of 24 inputs straddle blocks of 16: o_proj becomes bfloat16."""
    random_checkpoint.write(tmp_path / "hf", dataclasses.replace(small, v_head_dim=24), "nvfp4")
    arrays, config = fakes.load(tmp_path / "hf"), json.loads((tmp_path / "hf" / "config.json").read_text())
    arrays["model.layers.0.self_attn.o_proj.input_scale"] = np.ones((), np.float32)
    source = fakes.write_checkpoint(tmp_path / "source", config, arrays)
    convert.convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", against=source)
    ((why, names),) = report.changed.items()
    assert why == "dequantized to bfloat16: runs of 24 inputs straddle scale blocks of 16"
    assert names == ["3 x self_attn.o_proj.weight (layers 0-2)"]
    assert report.ignored == ["model.layers.0.self_attn.o_proj.input_scale"]
    assert report.lossless is False and report.proven == len(arrays) - 3 * 3 - 1
    assert verify(tmp_path / "out").ignored == ["1 activation scales: activations are not quantized"]


def test_another_source_is_told(converted, originals, tmp_path):
    """Other bytes, another dtype, a tensor less; what both have is compared all the same."""
    arrays, config = fakes.load(originals["nvfp4"]), json.loads((originals["nvfp4"] / "config.json").read_text())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    arrays[name][5, 7] ^= 0x10
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(ml_dtypes.bfloat16)
    del arrays["lm_head.weight"]
    other = fakes.write_checkpoint(tmp_path / "other", config, arrays)
    with pytest.raises(VerificationError) as caught:
        verify(converted["nvfp4"], against=other)
    text = str(caught.value)
    assert "different from the source (3):" in text and "damaged" not in text
    assert f"{name}: other bytes in {other / 'model.safetensors'}" in text
    assert f"model.norm.weight: BF16 [96] in {other / 'model.safetensors'}" in text
    assert f"lm_head.weight: not in {other}" in text
    assert f"is as it was written: {other} is another checkpoint" in text


def test_another_model_is_told_in_a_line(converted, small, tmp_path):
    """Its tensors are not listed one by one."""
    random_checkpoint.write(tmp_path / "hf", dataclasses.replace(small, moe_intermediate_size=32), "bf16")
    with pytest.raises(VerificationError) as caught:
        verify(converted["nvfp4"], against=tmp_path / "hf")
    size = f"moe_intermediate_size {small.moe_intermediate_size}, there 32"
    assert str(caught.value) == f"{tmp_path / 'hf'} is another model: {size}. No weights were compared"
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match="is another model, or has changed since: .* does not describe"):
        verify(converted["nvfp4"], against=tmp_path / "hf")


def test_a_quick_check_reads_no_array(converted, copy, capsys):
    code, out, _ = run(capsys, "verify", converted["fp8"], "--level", "quick")
    assert code == 0 and "(quick)" in out and "lossless" not in out
    assert verify(copy, level="quick").lossless is None
    with pytest.raises(UsageError, match="needs the level full"):
        verify(copy, level="quick", against=copy)
    with pytest.raises(UsageError, match="level must be one of quick, full"):
        verify(copy, level="deep")


@pytest.mark.parametrize("level", ["quick", "full"])
def test_files_that_are_missing_short_or_foreign_are_named(level, copy):
    files = sorted((copy / "weights").rglob("c.*"))
    (copy / "tokenizer.json").write_text("{}")
    (copy / "weights" / "00000" / "notes").touch()
    (copy / "weights" / "00000" / "_METADATA").unlink()
    (copy / "weights" / "00000" / "._notes").touch()
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(VerificationError) as caught:
        verify(copy, level=level)
    text = str(caught.value)
    assert "weights/00000/notes does not belong to the checkpoint" in text
    assert "weights/00000/_METADATA is missing" in text
    assert f"{files[0].relative_to(copy)} has {files[0].stat().st_size} bytes instead of" in text
    assert "tokenizer.json" not in text and "._notes" not in text


def test_load_names_weights_that_are_short_or_missing(copy):
    """Before any is read, and without `verify`."""
    first, second, *_ = sorted((copy / "weights").rglob("c.*"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(VerificationError, match="^2 files of .* are not as written; nothing was loaded") as told:
        ds.load(copy)
    assert f"{second.parent.name}/{second.name} is missing" in str(told.value) and "bytes instead of" in str(told.value)


def test_files_behind_links_are_files_of_the_folder(copy, tmp_path):
    """As on a disk of their own."""
    (linked := tmp_path / "linked").mkdir()
    for file in copy.iterdir():
        (linked / file.name).symlink_to(file)
    ds.load(linked, verify="full")
    damaged = next((copy / "weights").rglob("c.*"))
    damaged.unlink()
    with pytest.raises(VerificationError, match=f"^1 file of .*{damaged.name} is missing"):
        ds.load(linked)


def test_a_flipped_bit_in_a_large_tokenizer(originals, tmp_path):
    """All files but those of the store have a digest, however large."""
    source = shutil.copytree(originals["nvfp4"], tmp_path / "source")
    (source / "tokenizer.json").write_text(fakes.tokenizer(source, **{"x" * (1 << 21): 0}))
    convert.convert(source, tmp_path / "out")
    flip(tmp_path / "out" / "tokenizer.json", 1 << 20, 0)
    with pytest.raises(VerificationError, match="tokenizer.json"):
        verify(tmp_path / "out", level="quick")


def test_layers_are_folded():
    """What is said of many of them is said once."""
    lines = [f"layers.{i}.norm_D is missing" for i in (0, 1, 2, 5)] + [
        "head_VD is missing",
        "layers.7.x is missing",
        "layers.3.x is missing",
    ]
    assert fold_names(lines) == [
        "4 x norm_D is missing (layers 0-2, 5)",
        "head_VD is missing",
        "2 x x is missing (layers 3, 7)",
    ]


def test_a_missing_part_names_its_arrays(converted, copy):
    shutil.rmtree(copy / "weights" / "00000")
    with pytest.raises(VerificationError) as caught:
        verify(copy)
    entries = Manifest.read(converted["nvfp4"]).leaves.values()
    files = [name for entry in entries for array in entry.arrays.values() for name in array.place.files]
    told = str(caught.value)
    assert all(line in told for line in fold_names(f"{name} is missing" for name in files if "/00000/" in name))
    shutil.rmtree(copy / "weights")
    with pytest.raises(VerificationError, match="_METADATA is missing"):
        verify(copy)


@pytest.mark.parametrize("what", ["text", "number"])
def test_a_changed_manifest_is_told(what, copy, capsys):
    file = copy / "manifest.json"
    before, after = {"text": ('"folder": "nvfp4"', '"folder": "nvfp5"'), "number": ('size": 96,', 'size": 97,')}[what]
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    code, out, err = run(capsys, "verify", copy)
    assert code == 4 and not out
    assert "has changed since it was written" in err
    for level in (None, "quick", "full"):
        with pytest.raises(VerificationError):
            ds.load(copy, verify=level)


def test_what_is_no_converted_checkpoint_is_no_failed_verification(originals, tmp_path, capsys):
    code, _, err = run(capsys, "verify", originals["bf16"])
    assert code == 3 and "holds safetensors, not a converted checkpoint" in err
    assert run(capsys, "verify", tmp_path / "nothing")[0] == 3


def test_a_wrong_inverse_is_recognized(copy):
    """A manifest that notes another digest of a source tensor, and is consistent in itself."""
    manifest = Manifest.read(copy)
    path = "layers.1.ffn.w_up_EMD"
    entry = manifest.leaves[path]
    recorded = Provenance.of(entry)
    assert recorded is not None
    sources = list(recorded.sources)
    sources[4] = sources[4]._replace(sha256="0" * 64)
    provenance = recorded._replace(sources=tuple(sources)).to_json()
    leaves = manifest.leaves | {path: dataclasses.replace(entry, provenance=provenance)}
    dataclasses.replace(manifest, leaves=leaves).write(copy)
    assert Manifest.read(copy).digest == manifest.digest
    with pytest.raises(VerificationError, match=r"experts.1.up_proj.weight_scale: cannot be reconstructed"):
        verify(copy)


def test_what_has_no_provenance_is_not_proven(copy):
    """Nothing to compare with is no proof."""
    manifest = Manifest.read(copy)
    leaves = {path: dataclasses.replace(entry, provenance=None) for path, entry in manifest.leaves.items()}
    dataclasses.replace(manifest, leaves=leaves).write(copy)
    report = verify(copy)
    assert report.lossless is False and report.proven == 0
    assert report.changed.keys() == {"its source is not recorded"}


@pytest.mark.parametrize(
    "place, value, said",
    [
        (1, "XX", "which is no tensor"),
        (2, [10**30], "for model|is recorded|matrices|recorded as"),
        (2, [], "matrices|recorded as"),
        (3, "zz", "which is no tensor"),
        (4, "zz", "which is no tensor"),
    ],
)
def test_a_provenance_that_was_made_up_is_refused(place, value, said, copy, tmp_path):
    """By whoever computes with it, in a manifest that is sealed again."""

    def change(raw: dict) -> None:
        recorded = (leaf["provenance"] for leaf in raw["leaves"].values())
        for row in (row for one in recorded if one is not None for row in one["sources"]):
            row[place : place + 1] = [value]

    fakes.edit_manifest(copy, change)
    with pytest.raises((CheckpointError, VerificationError), match=said):
        verify(copy)
    with pytest.raises((CheckpointError, VerificationError)):
        export(copy, tmp_path / "hf", "bf16")


def test_a_flipped_bit_anywhere_is_named(fragile):
    """Every file, of arrays or not, is damaged at its first byte, its last and others; of an array the name is told and
    the part."""
    rng = random.Random(5)
    for file in sorted(file for file in fragile.rglob("*") if file.is_file() and file.name != ".lock"):
        size, holds_array = file.stat().st_size, file.name.startswith("c.")
        places = {0, size - 1, rng.randrange(size)} if not holds_array or size > 10_000 else {rng.randrange(size)}
        for at in places:
            bit = rng.randrange(8)
            flip(file, at, bit)
            try:
                with pytest.raises(VerificationError) as caught:
                    verify(fragile, level="full" if holds_array else "quick")
            finally:
                flip(file, at, bit)
            part, name = file.relative_to(fragile).parts[-3:-1] if holds_array else ("", "")
            said = f"{name} (weights/{part}) has changed" if holds_array else str(file.relative_to(fragile))
            assert said in str(caught.value), (file, at, bit)
    assert verify(fragile).lossless


def changed_bytes(raw: bytes, dense: int, rng: random.Random) -> Iterator[bytes]:
    """`raw` with each byte changed in one bit, and cut before each byte; of what is longer than `dense` so many."""
    for at in range(len(raw)) if len(raw) <= dense else sorted(rng.sample(range(len(raw)), dense)):
        yield raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        yield raw[:at]


def test_every_byte_of_every_small_file_is_covered(converted, originals, tmp_path):
    """Of the manifest, of what describes arrays, of companions, and of each array some; all that is not as written."""
    source, rng = shutil.copytree(originals["nvfp4"], tmp_path / "source"), random.Random(7)
    fakes.companions(source)
    manifest = convert.convert(source, folder := tmp_path / "out")
    described = {name: dataclasses.replace(manifest, leaves={}, storage={"files": {name: found}, "mesh": {}})
                 for name, found in manifest.storage["files"].items()}  # fmt: skip
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= described.keys()
    kinds: dict[str, str] = {Path(name).name: name for name in described}
    for name in kinds.values():
        for changed in changed_bytes((folder / name).read_bytes(), 4000, rng):
            (folder / name).write_bytes(changed)
            assert len(find_changed_files(folder, described[name])) == 1
        (folder / name).unlink()
    for changed in changed_bytes((folder / "manifest.json").read_bytes(), 2000, rng):
        (folder / "manifest.json").write_bytes(changed)
        with pytest.raises(VerificationError):
            Manifest.read(folder)
    reader = Reader(folder, manifest.leaves)
    for key, entry in reader.entries.items():
        (name,) = entry.place.files
        raw = (folder / name).read_bytes()
        for changed in changed_bytes(raw, 3, rng):
            (folder / name).write_bytes(changed)
            assert find_damage(reader, key) is not None
        (folder / name).write_bytes(raw)


def test_a_flipped_bit_never_loads(fragile):
    rng = random.Random(6)
    files = sorted(file for file in (fragile / "weights").rglob("*") if file.is_file())
    for file in rng.sample(files, 12):
        at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, at, bit)
        try:
            with pytest.raises(VerificationError) as caught:
                ds.load(fragile, verify="full")
        finally:
            flip(file, at, bit)
        assert "nothing was loaded" in str(caught.value)
        assert file.parent.name in str(caught.value) or str(file.relative_to(fragile)) in str(caught.value)
    ds.load(fragile, verify="full")


def test_loading_verifies_as_asked(copy):
    with pytest.raises(UsageError, match="verify must be one of None, quick, full"):
        ds.load(copy, verify="fully")
    for level in (None, "quick", "full"):
        ds.load(copy, verify=level)
    next((copy / "weights").rglob("c.*")).touch()
    ds.load(copy, verify="quick")
    (copy / "weights" / "00000" / "surplus").touch()
    with pytest.raises(VerificationError, match="weights/00000/surplus does not belong to the checkpoint"):
        ds.load(copy, verify="quick")


@pytest.mark.parametrize(
    "command, state",
    [
        ("verify {} --level quick", "Nothing was changed."),
        (
            "export {} {out}/a --format bf16",
            "{out}/a was not created; run the same command again to start over and replace {out}/.a.unfinished.",
        ),
        ("reshard {} {out}/b", "Nothing is saved yet; run the same command again to continue."),
    ],
)
def test_a_signal_is_answered_with_the_state_of_things(command, state, converted, tmp_path, monkeypatch, capsys):
    from dsv32_jax.convert import signals

    heard = []
    exit_on_signal = signals.exit_on_signal
    monkeypatch.setattr(
        signals, "exit_on_signal", lambda message: heard.append(message("SIGTERM", 75)) or exit_on_signal(message)
    )
    assert cli.main([part.format(converted["bf16"], out=tmp_path) for part in command.split()]) == 0
    assert heard == [f"\nSIGTERM: stopped. {state.format(out=tmp_path)}\n".encode()]
    assert capsys.readouterr().out


def test_verifying_needs_no_jax(converted):
    code = "import sys; from dsv32_jax import cli; sys.exit(cli.main(sys.argv[1:]) or 'jax' in sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code, "verify", str(converted["fp8"]), "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lossless"] is True


def test_the_provenance_tells_where_a_leaf_came_from(converted, originals):
    manifest = Manifest.read(converted["nvfp4"])
    entry = manifest.leaves["layers.0.mla.w_qr_HRQ"]
    name = "model.layers.0.self_attn.q_b_proj.weight"
    recorded = Provenance.of(entry)
    assert recorded is not None and recorded.cut == (0, 32, 24, 32) and not recorded.change
    assert [source.name for source in recorded.sources] == [name, name + "_scale", name + "_scale_2"]
    assert manifest.source["files"].keys() == {file.name for file in originals["nvfp4"].glob("*.safetensors")}
    assert all(len(file["header_sha256"]) == 64 for file in manifest.source["files"].values())
