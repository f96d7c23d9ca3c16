"""Damaged and malicious input by the thousand: python -m tests.fuzz [--cases N] [--seed S] [--only KIND].

Each case is a small checkpoint, or messages or a completion, of which a part is changed by chance: bits, cuts, values
of other types, keys that are missing or doubled, other files in its place. It must be read as before or end in one of
the errors that this package raises on purpose, within SECONDS and MOST_BYTES; anything else is a finding.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import convert
import dsv32_jax as ds
from configs import path
from convert.inspect.folder_tree import inspect
from convert.verify.verify import verify
from convert.write.journal import seal
from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.chat.messages import load_json
from dsv32_jax.chat.tokenizer import BYTE_LETTERS, Tokenizer
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.checkpoint.load import Checkpoint
from dsv32_jax.checkpoint.manifest import seal as seal_manifest
from dsv32_jax.cli.conversation_file import load_conversation
from dsv32_jax.config import Config
from dsv32_jax.errors import DsvError

SECONDS, MOST_BYTES = 20, 1 << 30
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    -(10**400),
    "",
    "x",
    "\x1b[31m",
    "../../x",
    [],
    {},
    [[]],
    {"": 0},
]
RAW = [b"NaN", b"1e999", b"-0", b'"\\ud83d"', b"{}", b"[" * 2000, b"\xff", b"\xef\xbb\xbf", b"", b"9" * 5000, b"null"]
FOREIGN = [
    b"",
    b"<html>",
    b"version https://git-lfs",
    b"\x1f\x8b" + bytes(20),
    b"PK\x03\x04",
    b"null",
    b"[]",
    b"7",
    b"\0" * 99,
]


class Hang(BaseException):
    """The time of a case is over."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value` with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_value(rng: random.Random, value: Any) -> Any:
    """A copy of JSON in which one to three values are others, or missing, or new."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        if not (found := list(places(value))):
            return rng.choice(ODD)
        container, key = rng.choice(found)
        other = copy.deepcopy(rng.choice([*ODD, rng.choice(found)[1], rng.choice(found)[0]]))
        match rng.randrange(4):
            case 0 if isinstance(container, dict):
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(["x", "lora", "mlp_bias", "__metadata__", str(key) + "_"])] = other
            case 2 if isinstance(container[key], int):
                container[key] += rng.choice([1, -1, 2**31, 10**6])
            case _:
                container[key] = other
    return value


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """A copy of bytes with flips, cuts, insertions, or something else altogether."""
    found = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                found[at:at] = rng.choice(RAW)
            case 3:
                end = min(len(found), at + rng.randrange(40))
                found[at:at] = found[at:end]
            case 4:
                del found[at : at + rng.randrange(40)]
            case 5 if rng.random() < 0.1:
                found = bytearray(rng.choice(FOREIGN))
    return bytes(found)


def change_json(rng: random.Random, raw: bytes) -> bytes:
    """The bytes of a JSON file, changed as values or as bytes."""
    if rng.random() < 0.7:
        return json.dumps(change_value(rng, json.loads(raw)), ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", "replace"
        )
    return change_bytes(rng, raw)


def change_header(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = change_json(rng, raw[8 : 8 + length])
    claimed = len(header) if rng.random() < 0.9 else rng.choice([0, 2**63, length])
    return struct.pack("<Q", claimed) + header + raw[8 + length :]


@dataclasses.dataclass
class World:
    """Sound files, from which each case is made, and what is read from them."""

    root: Path
    cfg: Config
    model: Any = None

    @classmethod
    def make(cls, root: Path) -> "World":
        cfg = dataclasses.replace(
            Config.from_json(path("tiny")), num_hidden_layers=2, vocab_size=320, eos_token_id=(1,)
        )
        world = cls(root, cfg)
        random_checkpoint.write(root / "hf", cfg, "nvfp4")
        specials = [{"id": i, "content": str(text)} for i, text in enumerate([*template.SPECIAL, template.DSML])]
        vocab = {letter: 7 + i for i, letter in enumerate(BYTE_LETTERS)}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        tokenizer = {"added_tokens": specials, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
        (root / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
        (root / "hf" / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": template.EOS, "add_bos_token": True})
        )
        (root / "hf" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
        generation = {"eos_token_id": [1, 9], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
        (root / "hf" / "generation_config.json").write_text(json.dumps(generation))
        convert.convert(root / "hf", root / "out")
        talk = {"kind": "dsv32_jax conversation 1", "system": "s", "tools": [], "thinking": False, "messages": MESSAGES}
        (root / "talk.json").write_text(json.dumps(talk))
        model = ds.load(root / "out", dtype="float32")
        ds.inspect.trace(model, [[0, 5, 6]]).save(root / "trace.safetensors")
        session = ds.session(model, capacity=16)
        session.generate([0, 5, 6], max_new_tokens=2)
        session.save(root / "session.safetensors")
        world.model = model
        return world

    def copy(self, name: str) -> Path:
        """A copy of the folder `name` that a case may damage."""
        shutil.rmtree(self.root / "case", ignore_errors=True)
        return Path(shutil.copytree(self.root / name, self.root / "case", symlinks=True))


def convert_case(name: str, change: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, World], None]:
    """A case that converts, and inspects, a checkpoint of which one file was changed."""

    def run(rng: random.Random, world: World) -> None:
        folder = world.copy("hf")
        file = rng.choice(sorted(folder.glob(name)))
        before = file.read_bytes()
        file.write_bytes(change(rng, before))
        shutil.rmtree(world.root / "made", ignore_errors=True)
        with contextlib.suppress(DsvError):
            inspect(folder)
        manifest = convert.convert(folder, world.root / "made", workers=1, ignore_config=[])
        verify(world.root / "made")
        Tokenizer.load(world.root / "made", Config.from_dict(manifest.config))
        ds.Sampling.from_checkpoint(world.root / "made")
        if name.endswith(("index.json", "quant_config.json")):
            assert manifest.digest == convert.convert(world.root / "hf", world.root / "out").digest, "another result"

    return run


def manifest_case(rng: random.Random, world: World) -> None:
    """A converted checkpoint whose manifest was changed is not loaded as another model."""
    folder = world.copy("out")
    before = (folder / "manifest.json").read_bytes()
    if rng.random() < 0.2:
        changed = change_bytes(rng, before)
    else:
        changed = seal_manifest(change_json(rng, b"{" + before.partition(b",\n")[2]).removeprefix(b"{"))
    (folder / "manifest.json").write_bytes(changed)
    for look in (Checkpoint.open, inspect, verify):
        with contextlib.suppress(DsvError):
            look(folder)
    Checkpoint.open(folder, "full")
    verify(folder)


def journal_case(rng: random.Random, world: World) -> None:
    """An unfinished conversion whose journal was changed is continued to the same result, or refused."""
    folder = world.copy("out")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").unlink()
    basis = {"format_version": 3, "config": {}, "files": manifest["source"]["files"], "recipe": [], "mesh": {}}
    line = {"plan": manifest["source"]["plan"], "source": "hf", "basis": basis, "stamps": {}}
    part = {"part": "00000", "leaves": manifest["leaves"], "facts": {}, "outcomes": {}}
    lines = [line, {"begin": "00000"}, part]
    at = rng.randrange(3)
    lines[at] = change_value(rng, lines[at])
    text = "".join(seal(one) for one in lines[: rng.randint(1, 3)]).encode()
    (folder / "journal.jsonl").write_bytes(change_bytes(rng, text) if rng.random() < 0.7 else text)
    assert convert.convert(world.root / "hf", folder, workers=1).digest == manifest["digest"], "another result"


def session_case(rng: random.Random, world: World) -> None:
    """A saved session of which the header or any byte was changed."""
    file = world.root / "changed.safetensors"
    raw = (world.root / "session.safetensors").read_bytes()
    file.write_bytes(change_header(rng, raw) if rng.random() < 0.7 else change_bytes(rng, raw))
    loaded = ds.load_session(world.model, file)
    assert loaded.tokens == ds.load_session(world.model, world.root / "session.safetensors").tokens, "another result"


def trace_case(rng: random.Random, world: World) -> None:
    """A saved trace, the same."""
    file = world.root / "changed.safetensors"
    raw = (world.root / "trace.safetensors").read_bytes()
    file.write_bytes(change_header(rng, raw) if rng.random() < 0.7 else change_bytes(rng, raw))
    trace = ds.inspect.Trace.load(file)
    repr(trace)
    trace.config  # noqa: B018


def conversation_case(rng: random.Random, world: World) -> None:
    """A saved conversation."""
    file = world.root / "changed.json"
    file.write_bytes(change_json(rng, (world.root / "talk.json").read_bytes()))
    talk = load_conversation(file)
    with contextlib.suppress(DsvError):
        talk.text().encode()


CALL = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"x": 1, "y": "a"}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MESSAGES = [
    {"role": "system", "content": "s", "tools": [TOOL]},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [CALL, {**CALL, "id": "c1"}]},
    {"role": "tool", "content": "1", "tool_call_id": "c1"},
    {"role": "tool", "content": "2", "tool_call_id": "c0"},
    {"role": "assistant", "content": "y", "reasoning_content": "r"},
    {"role": "user", "content": "z"},
]


def messages_case(rng: random.Random, world: World) -> None:
    """Messages that are no messages."""
    messages = change_value(rng, MESSAGES[: rng.randint(1, 7)])
    text = chat.encode(messages, thinking=rng.random() < 0.5)
    text.encode()
    tokenizer = Tokenizer.load(world.root / "hf", world.cfg)
    prompt = chat.prepare(messages, tokenizer, thinking=rng.random() < 0.5)
    assert tokenizer.decode(prompt.ids) == prompt.text, "another result"


PARTS = [
    *(
        '<｜DSML｜parameter name="x" string="true">',
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        "｜DSML｜",
        "</think>",
    ),
    *(template.EOS, template.BOS, "\n", "<", ">", '"', "NaN", "1e999", '["\\ud83d"]', '{"a":1,"a":2}', "\\", "\0", "é"),
]


def completion_case(rng: random.Random, world: World) -> None:
    """A completion with tool calls: whatever is returned as a call can be said again, and comes back the same."""
    text = chat.encode(MESSAGES[:3], thinking=True).partition("<think>")[2]
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(text) + 1)
        part = rng.choice([*PARTS, text[at : at + 60]]) * rng.randint(0, 2)
        text = text[:at] + part + text[at + rng.randrange(12) * rng.randint(0, 1) :]
    message, warnings = chat.parse_lenient(text, thinking=True)
    if not warnings:
        assert chat.parse(text, thinking=True) == message, "another result"
    calls = message["tool_calls"]
    for call in calls:
        assert isinstance(load_json(call["function"]["arguments"]), dict), "no object"
    again = {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": calls}
    if calls and not any(mark in call["function"]["name"] for call in calls for mark in ('"', "\n")):
        encoded = chat.encode([again], thinking=True, context=MESSAGES[:2])
        found = chat.parse_lenient(encoded, thinking=True).message["tool_calls"]
        values = [[json.loads(one["function"]["arguments"]) for one in some] for some in (calls, found)]
        held = any("DSML" in str(value) for value in values[0])
        assert held or values[0] == values[1], "another result"


CASES: dict[str, Callable[[random.Random, World], None]] = {
    "header": convert_case("*.safetensors", change_header),
    "index": convert_case("model.safetensors.index.json", change_json),
    "config": convert_case("config.json", change_json),
    "quantization": convert_case("hf_quant_config.json", change_json),
    "generation": convert_case("generation_config.json", change_json),
    "tokenizer": convert_case("tokenizer.json", change_json),
    "tokenizer_config": convert_case("tokenizer_config.json", change_json),
    "manifest": manifest_case,
    "journal": journal_case,
    "session": session_case,
    "trace": trace_case,
    "conversation": conversation_case,
    "messages": messages_case,
    "completion": completion_case,
}


def run_case(kind: str, seed: int, world: World) -> str:
    """What is wrong with the outcome of one case, "" for nothing."""

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        CASES[kind](random.Random(f"{kind} {seed}"), world)
    except DsvError as error:
        if error.exit_code == 1 or any(0xD800 <= ord(char) < 0xE000 for char in str(error)):
            return f"exit code 1 or a message that cannot be printed: {error!r:.300}"
    except Hang:
        return f"no end after {SECONDS} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"{grown >> 20} MiB of memory" if grown > MOST_BYTES else ""


def fuzz(world: World, kinds: list[str], first: int, cases: int, seconds: float = np.inf) -> tuple[int, list[str]]:
    """Run cases of all kinds in turn; return their number, and a line for each finding."""
    findings, done, end = [], 0, time.monotonic() + seconds
    for seed in range(first, first + -(-cases // len(kinds))):
        for kind in kinds:
            if time.monotonic() > end:
                return done, findings
            done += 1
            if wrong := run_case(kind, seed, world):
                findings.append(f"{kind} {seed}: {wrong}")
    return done, findings


def main() -> int:
    """Run the cases that the command line asks for; 1 where any was a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(CASES), action="append")
    arguments = parser.parse_args()
    os.nice(10)
    with tempfile.TemporaryDirectory() as folder:
        world = World.make(Path(folder))
        kinds, found = arguments.only or list(CASES), 0
        for seed in range(arguments.seed, arguments.seed + -(-arguments.cases // len(kinds))):
            _, findings = fuzz(world, kinds, seed, len(kinds))
            found += len(findings)
            print("\n".join(findings), end="\n" * bool(findings), flush=True)
    print(f"{arguments.cases} cases, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
