"""One kind of damage has one exit code, whichever command meets it, and never a traceback."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv32_jax import cli

from . import fakes

READERS = {
    "verify": "verify {}",
    "verify quick": "verify {} --level quick",
    "statistics": "inspect {} --tensors * --stats",
    "export": "export {} {out}/hf --format bf16",
    "reshard": "reshard {} {out}/again",
    "load": "generate {} --ids 0,5 --max-new-tokens 1",
    "load quick": "generate {} --ids 0,5 --max-new-tokens 1 --verify quick",
    "load full": "generate {} --ids 0,5 --max-new-tokens 1 --verify full",
    "convert again": "convert {source} {}",
}
"""The commands that read arrays of a converted checkpoint."""

OTHERS = {
    "inspect": "inspect {}",
    "tensors": "inspect {} --tensors *",
    "fit": "fit {}",
    "chat": "chat {}",
    "perplexity": "eval ppl {}",
    "bench": "bench load {}",
}
"""Those that begin with its manifest."""

COMMANDS = READERS | OTHERS
HASHING = {"verify", "statistics", "export", "reshard", "load full"}
"""Those that compare the content of arrays with its SHA-256."""

CHECKING = {"verify", "verify quick", "load quick", "load full", "convert again"}
"""Those that compare every other file."""

LONG = "x" * 5000


def first_array(folder: Path) -> Path:
    return max((folder / "weights").rglob("c.*"), key=lambda file: file.stat().st_size)


def rewrite(name: str, content: Callable[[bytes], bytes]):
    """Damage one file: `name`, or the largest array."""

    def damage(folder: Path) -> None:
        file = first_array(folder) if name == "array" else next(folder.rglob(name))
        file.write_bytes(content(file.read_bytes()))

    return damage


def replace(name: str, make: Callable[[Path], object]):
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        file = first_array(folder) if name == "array" else folder / name
        file.unlink()
        make(file)

    return damage


def make_sparse(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(4 << 40)


def flip(raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


def nothing(file: Path) -> None:
    pass


KINDS: dict[str, tuple[Callable[[Path], object], int, set[str]]] = {
    "an array cut short": (rewrite("array", lambda raw: raw[:-1]), 4, set(READERS)),
    "an array that is missing": (replace("array", nothing), 4, set(READERS)),
    "a pipe in place of an array": (replace("array", os.mkfifo), 4, set(READERS)),
    "a folder in place of an array": (replace("array", os.mkdir), 4, set(READERS)),
    "a link in place of an array": (replace("array", lambda file: file.symlink_to("/dev/zero")), 4, set(READERS)),
    "a flipped bit in an array": (rewrite("array", flip), 4, HASHING),
    "a flipped bit in a description": (rewrite("zarr.json", flip), 4, CHECKING),
    "a description that is missing": (replace("weights/00000/_METADATA", nothing), 4, CHECKING),
    "no weights": (lambda folder: shutil.rmtree(folder / "weights"), 4, set(READERS)),
    "a flipped bit in the manifest": (rewrite("manifest.json", flip), 4, set(COMMANDS)),
    "a torn manifest": (rewrite("manifest.json", lambda raw: raw[: len(raw) // 2]), 4, set(COMMANDS)),
    "an empty manifest": (rewrite("manifest.json", lambda raw: b""), 4, set(COMMANDS)),
    "a manifest that is no JSON": (rewrite("manifest.json", lambda raw: b"\0" * 99), 4, set(COMMANDS)),
    "a pipe in place of the manifest": (replace("manifest.json", os.mkfifo), 4, set(COMMANDS)),
    "a manifest of four tebibytes": (replace("manifest.json", make_sparse), 4, set(COMMANDS)),
    "a newer manifest": (
        lambda folder: fakes.edit_manifest(folder, lambda raw: raw.update(format_version=4)),
        3,
        set(COMMANDS),
    ),
    "a manifest of other types": (
        lambda folder: fakes.edit_manifest(folder, lambda raw: raw.update(report=[], storage={"files": 3})),
        3,
        set(COMMANDS),
    ),
    "a manifest that leads elsewhere": (
        lambda folder: fakes.edit_manifest(folder, lambda raw: raw["storage"]["files"].update({"../x": [1, "0"]})),
        3,
        set(COMMANDS),
    ),
    "no manifest": (
        replace("manifest.json", nothing),
        3,
        set(COMMANDS) - {"inspect", "tensors", "statistics"} - CHECKING,
    ),
    "no folder": (shutil.rmtree, 3, set(COMMANDS) - {"convert again"}),
}
"""Damage of a converted checkpoint, its exit code, and the commands that must tell it."""


def run(name: str, folder: Path, originals, tmp_path: Path, capsys) -> int:
    """The exit code of one command; that of a traceback is none."""
    filled = COMMANDS[name].replace("{}", str(folder)).format(source=originals["nvfp4"], out=tmp_path / "made" / name)
    try:
        code = cli.main(filled.split())
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 0 or printed.err.count("error: ") == 1, printed.err
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_damage_has_one_code(kind, converted, originals, tmp_path, capsys):
    damage, code, commands = KINDS[kind]
    damage(shutil.copytree(converted["nvfp4"], folder := tmp_path / "copy"))
    found = {name: run(name, folder, originals, tmp_path, capsys) for name in COMMANDS if name in commands}
    assert found == dict.fromkeys(found, code)


@pytest.mark.parametrize("name, commands", [("manifest.json", set(COMMANDS)), ("array", set(READERS))])
def test_what_cannot_be_read_is_no_damage(name, commands, converted, originals, tmp_path, capsys, monkeypatch):
    """A failure of the disk or its permissions has the code of those."""
    folder = shutil.copytree(converted["nvfp4"], tmp_path / "copy")
    wanted, opened = str(first_array(folder) if name == "array" else folder / name), os.open

    def refuse(path, *arguments, **named):
        if os.path.realpath(os.fspath(path)) == wanted:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    found = {one: run(one, folder, originals, tmp_path, capsys) for one in COMMANDS if one in commands}
    assert found == dict.fromkeys(found, 74)


SOURCE_COMMANDS = (
    "convert {} {out}",
    "convert {} {out} --dry-run",
    "inspect {} --tensors * --stats",
    "verify {done} --against {}",
)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("how, code", [("torn", 3), ("pipe", 3), ("unreadable", 74)])
def test_a_source_too(how, code, name, converted, originals, tmp_path, capsys, monkeypatch):
    """By every command that opens one."""
    folder, opened = shutil.copytree(originals["nvfp4"], tmp_path / "copy"), os.open
    file = folder / name
    if how == "torn":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:

        def refuse(path, *arguments, **named):
            if os.fspath(path) == str(file):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return opened(path, *arguments, **named)

        monkeypatch.setattr(os, "open", refuse)
    for command in SOURCE_COMMANDS:
        filled = command.replace("{}", str(folder)).format(out=tmp_path / "out", done=converted["nvfp4"])
        assert cli.main(filled.split()) == code, command
        assert "Traceback" not in capsys.readouterr().err


def test_a_name_that_no_file_can_have(converted, originals, tmp_path, capsys):
    """Too long a name is a mistake in the command, wherever it is given."""
    commands = {**COMMANDS, **{command: command for command in SOURCE_COMMANDS}}
    for name, command in commands.items():
        filled = command.replace("{}", LONG).format(source=originals["nvfp4"], out=tmp_path, done=converted["nvfp4"])
        assert cli.main(filled.split()) == 2, name
        assert "a name in it has 5000 bytes" in capsys.readouterr().err
