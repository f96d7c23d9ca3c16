"""Which weight is converted to which format: ordered patterns over the names of the source's tensors.

A policy file is JSON or TOML with one table, `formats`, from shell patterns to "nvfp4", "fp8", "bf16" or "keep":

    {"formats": {"model.layers.{mtp}.*": "keep", "*.kv_b_proj.weight": "fp8", "*.mlp.experts.*": "nvfp4"}}

The first pattern that matches a whole name, such as model.layers.3.mlp.experts.7.up_proj.weight, decides; {mtp} stands
for the number of the MTP layer. What no pattern matches gets the format of `--to`, and without that keeps its own.

Quantized are only the matrices that DeepSeek itself quantizes. A pattern quantizes another one (router, head) only if
it ends with that tensor's last two words, such as "lm_head.weight"; the embedding and vectors are never quantized.
"""

import dataclasses
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv32_jax.errors import CheckpointError, UsageError, listing
from dsv32_jax.quantization.quantize import NVFP4_BLOCK
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.files import JsonLimits, expand_path, parse_json

from ..read.stored import BECOMES, Stored

KEEP = "keep"
TO = "to"
"""In presets: whatever `--to` says."""

LINEARS = frozenset("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj wq_b wk gate_proj up_proj down_proj".split())
"""What DeepSeek ships in FP8."""

LOOKED_UP = "embed_tokens"
"""The embedding: its rows are looked up, so it must be a plain array."""

MTP = "model.layers.{mtp}.*"

PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    "default": ((MTP, KEEP), ("*.o_proj.weight", TO), ("*.self_attn.*", KEEP)),
    "nvidia": ((MTP, "bf16"), ("*.o_proj.weight", TO), ("*.self_attn.*", "bf16")),
    "full": (),
    "experts-only": ((MTP, KEEP), ("*.mlp.experts.*", TO), ("*", KEEP)),
}
"""default: experts, shared experts, dense feed-forward and o_proj; the rest of attention, indexer and MTP keep theirs.
nvidia: the same, the rest in bfloat16, as NVIDIA's checkpoint is. full: everything that DeepSeek quantizes."""

DEFAULTS = {"nvfp4": "default", "fp8": "full", "bf16": "full"}
"""What is meant where only the format is given."""


TENSOR_SCALES = ("own", "shared")


class Policy(NamedTuple):
    """Patterns with their formats, in order, and the format of what none of them matches. `file`: where they are from,
    None for a preset."""

    rules: tuple[tuple[str, str], ...] = ()
    otherwise: str = KEEP
    file: Path | None = None


class Recipe(NamedTuple):
    """How weights are converted. `scales`: one of SCALINGS, how NVFP4 block scales are chosen. `tensor_scales`: "own",
    or "shared" where gate and up (q_a and kv_a) have one, as kernels that compute both at once want it."""

    policy: Policy = Policy()
    scales: str = "rtn"
    tensor_scales: str = "own"


def recipe(to: str | None, name: str | Path | None, scales: str, tensor_scales: str) -> Recipe:
    """The recipe that a user asks for. Raises UsageError."""
    for what, given, known in (("scales", scales, SCALINGS), ("tensor scales", tensor_scales, TENSOR_SCALES)):
        if given not in known:
            raise UsageError(f"{what} are one of {listing(known)}, not {given!r}; nothing was read")
    return Recipe(policy(to, name), scales, tensor_scales)


def policy(to: str | None = None, name: str | Path | None = None) -> Policy:
    """The policy of `--to` and `--policy` (a preset or a file). Raises UsageError that lists everything wrong."""
    if to is not None and to not in BECOMES:
        raise UsageError(f"weights can be converted to {listing(BECOMES)}, not to {to!r}; nothing was read")
    if name is None:
        return Policy() if to is None else policy(to, DEFAULTS[to])
    if isinstance(name, str) and name in PRESETS:
        if to is None:
            raise UsageError(f"the policy {name} needs a format to convert to: add --to with one of {listing(BECOMES)}")
        rules = tuple((pattern, to if format == TO else format) for pattern, format in PRESETS[name])
        return Policy(rules, to)
    file = expand_path(name)
    return Policy(_read(file), KEEP if to is None else to, file)


def _read(file: Path) -> tuple[tuple[str, str], ...]:
    """The rules of a policy file."""
    try:
        text = file.read_bytes()
        raw = tomllib.loads(text.decode()) if file.suffix == ".toml" else parse_json(text, JsonLimits())
    except FileNotFoundError:
        raise UsageError(f"{file} is neither a preset ({listing(PRESETS)}) nor a file; nothing was read") from None
    except (OSError, ValueError, CheckpointError) as error:
        raise UsageError(f"the policy {file} cannot be read: {error}; nothing was converted") from None
    if problems := list(_problems(raw)):
        raise UsageError(
            f"the policy {file} has {len(problems)} problems; nothing was converted: {listing(problems, 20)}"
        )
    return tuple(raw["formats"].items())


def _problems(raw: Any) -> Iterator[str]:
    """Everything wrong with the content of a policy file."""
    if not isinstance(raw, dict) or not isinstance(raw.get("formats"), dict):
        yield "it must hold a table `formats`"
        return
    yield from (f"unknown key {key!r}" for key in raw if key != "formats")
    formats = (*BECOMES, KEEP)
    for pattern, format in raw["formats"].items():
        if format not in formats:
            yield f"{pattern!r} is to become {format!r}, not one of {listing(formats)}"


IDLE = (
    "no weight is called {pattern}",
    "{pattern} decides nothing: an earlier pattern matches each weight of that name",
    "{pattern} changes nothing: quantized are only the matrices that DeepSeek quantizes, and weights whose last two "
    "words a pattern ends with",
)
"""What a pattern is told to be, from the least use to more of it."""


class Chooser:
    """Applies a policy to the weights of one checkpoint. `impossible` is what was asked for and cannot be: (name,
    reason)."""

    def __init__(self, policy: Policy, mtp_layer: int):
        self._rules = [
            (re.compile(fnmatch.translate(pattern.replace("{mtp}", str(mtp_layer)))), pattern, format)
            for pattern, format in policy.rules
        ]
        self._otherwise = policy.otherwise
        self._use = dict.fromkeys((pattern for pattern, _ in policy.rules), 0)
        self.impossible: list[tuple[str, str]] = []

    def __call__(self, stored: Stored) -> Stored:
        """`stored` with the format it shall have."""
        matching = [(pattern, format) for regex, pattern, format in self._rules if regex.match(stored.name)]
        (pattern, format), *overruled = matching or [("", self._otherwise)]
        covers = format == KEEP or _covers(pattern, format, stored)
        self._note(pattern, len(IDLE) if covers else 2)
        for other, _ in overruled:
            self._note(other, 1)
        if format == KEEP or stored.is_in(format) or not covers:
            return stored
        if reason := _obstacle(stored, format):
            self.impossible.append((stored.name, reason))
            return stored
        return dataclasses.replace(stored, wanted=format)

    def idle(self) -> list[str]:
        """What is to be said of each pattern that has been of no use."""
        return [IDLE[use].format(pattern=pattern) for pattern, use in self._use.items() if use < len(IDLE)]

    def _note(self, pattern: str, use: int) -> None:
        if pattern in self._use:
            self._use[pattern] = max(use, self._use[pattern])


def _covers(pattern: str, format: str, stored: Stored) -> bool:
    """Whether a rule means this weight: a linear, one that the pattern names, or a quantized one to be dequantized."""
    words = stored.name.split(".")[-2:]
    if (words[0] in LINEARS and words[1] == "weight") or pattern.split(".")[-2:] == words:
        return True
    return format == "bf16" and stored.format != "dense"


def _obstacle(stored: Stored, format: str) -> str | None:
    """Why the weight cannot be in `format`."""
    if format == "bf16":
        return None
    if len(stored.shape) != 2:
        return f"{list(stored.shape)} is not a matrix"
    if LOOKED_UP in stored.name:
        return "its rows are looked up"
    if format == "nvfp4" and stored.shape[1] % NVFP4_BLOCK:
        return f"{stored.shape[1]} inputs are no multiple of {NVFP4_BLOCK}"
    return None
