"""Which weight is converted to which format: ordered patterns over the names of the source's tensors.

A policy file is JSON or TOML with one table, `formats`, from shell patterns to "nvfp4", "fp8", "bf16" or "keep":

    {"formats": {"model.layers.{mtp}.*": "keep", "*.kv_b_proj.weight": "fp8", "*.mlp.experts.*": "nvfp4"}}

The first pattern that matches a whole name, such as model.layers.3.mlp.experts.7.up_proj.weight, decides; {mtp} stands
for the number of the MTP layer. A weight that no pattern matches gets the format of `--to`, or else keeps its own.

Only the matrices that DeepSeek itself quantizes are quantized. A pattern quantizes another one (router, head) only if
it ends with that tensor's last two words, such as "lm_head.weight"; the embedding and vectors are never quantized.
"""

import dataclasses
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv32_jax.errors import CheckpointError, UsageError, argument, listing, pluralize
from dsv32_jax.quantization.quantize import NVFP4_BLOCK
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.files import expand_path, parse_json, read_regular

from ..read.weights import TARGETS, StoredWeight

LARGEST = 16 << 20
"""Size limit of a policy file in bytes."""

KEEP = "keep"
TO = "to"
"""In presets: the format of `--to`."""

LINEARS = frozenset("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj wq_b wk gate_proj up_proj down_proj".split())
"""The linears that DeepSeek ships in FP8."""

EMBEDDING = "embed_tokens"
"""Its rows are looked up, so it must be a plain array."""

MTP = "model.layers.{mtp}.*"

PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    "default": ((MTP, KEEP), ("*.o_proj.weight", TO), ("*.self_attn.*", KEEP)),
    "nvidia": ((MTP, "bf16"), ("*.o_proj.weight", TO), ("*.self_attn.*", "bf16")),
    "full": (),
    "experts-only": ((MTP, KEEP), ("*.mlp.experts.*", TO), ("*", KEEP)),
}
"""default: experts, shared experts, dense feed-forward and o_proj; the rest of attention, indexer and MTP keep theirs.
nvidia: the same, the rest in bfloat16, as in NVIDIA's checkpoint. full: everything that DeepSeek quantizes."""

DEFAULTS = {"nvfp4": "default", "fp8": "full", "bf16": "full"}
"""The preset of each format if no policy is given."""

TENSOR_SCALES = ("own", "shared")


class Policy(NamedTuple):
    """Patterns with their formats, in order; the format of weights that match none; the file they come from, if any."""

    rules: tuple[tuple[str, str], ...] = ()
    otherwise: str = KEEP
    file: Path | None = None


class Recipe(NamedTuple):
    """How weights are converted. `scales`: one of SCALINGS, how NVFP4 block scales are chosen. `tensor_scales`: "own",
    or "shared" if gate and up (q_a and kv_a) get one, as kernels that fuse them require."""

    policy: Policy = Policy()
    scales: str = "rtn"
    tensor_scales: str = "own"


def make_recipe(to: str | None, policy: str | Path | None, scales: str, tensor_scales: str) -> Recipe:
    """Return the recipe for the user's options. Raises UsageError."""
    for name, value, known in (("scales", scales, SCALINGS), ("tensor_scales", tensor_scales, TENSOR_SCALES)):
        if value not in known:
            raise UsageError(f"invalid {argument(name, value)}: choose one of {listing(known)}. Nothing was read")
    return Recipe(make_policy(to, policy), scales, tensor_scales)


def make_policy(to: str | None = None, policy: str | Path | None = None) -> Policy:
    """Return the policy of a format and a preset or file. Raises UsageError listing everything wrong with a file."""
    if to is not None and to not in TARGETS:
        raise UsageError(f"invalid {argument('to', to)}: choose one of {listing(TARGETS)}. Nothing was read")
    if policy is None:
        return Policy() if to is None else make_policy(to, DEFAULTS[to])
    if isinstance(policy, str) and policy in PRESETS:
        if to is None:
            raise UsageError(
                f"{argument('policy', policy)} needs a format to convert to: add {argument('to')} with one of "
                f"{listing(TARGETS)}. Nothing was read"
            )
        rules = tuple((pattern, to if format == TO else format) for pattern, format in PRESETS[policy])
        return Policy(rules, to)
    file = expand_path(policy)
    return Policy(_read_rules(file), KEEP if to is None else to, file)


def _read_rules(file: Path) -> tuple[tuple[str, str], ...]:
    try:
        text = read_regular(file, LARGEST)
        raw = tomllib.loads(text.decode("utf-8-sig")) if file.suffix == ".toml" else parse_json(text)
    except FileNotFoundError:
        raise UsageError(f"{file} is neither a preset ({listing(PRESETS)}) nor a file. Nothing was read") from None
    except (OSError, ValueError, CheckpointError) as error:
        raise UsageError(f"cannot read the policy {file}: {error}. Nothing was converted") from None
    if problems := list(_find_problems(raw)):
        count = pluralize(len(problems), "problem")
        raise UsageError(f"the policy {file} has {count}: {listing(problems, 20)}. Nothing was converted")
    return tuple(raw["formats"].items())


def _find_problems(raw: Any) -> Iterator[str]:
    """Yield everything wrong with the content of a policy file."""
    if not isinstance(raw, dict) or not isinstance(raw.get("formats"), dict):
        yield "it has no table `formats`"
        return
    yield from (f"unknown key {key!r}" for key in raw if key != "formats")
    formats = (*TARGETS, KEEP)
    for pattern, format in raw["formats"].items():
        if format not in formats:
            yield f"invalid format {format!r} of {pattern!r}: choose one of {listing(formats)}"


UNMATCHED, OVERRULED, UNQUANTIZED, EFFECTIVE = range(4)
"""How far a pattern gets."""

INEFFECTIVE = {
    UNMATCHED: "no weight matches {pattern}",
    OVERRULED: "{pattern} has no effect: earlier patterns match every weight that it matches",
    UNQUANTIZED: "{pattern} has no effect: only matrices that DeepSeek quantizes are quantized, and weights whose last "
    "two words a pattern ends with",
}


class FormatChooser:
    """Applies a policy to the weights of one checkpoint. `impossible`: (name, reason) of weights that cannot have the
    format the policy gives them."""

    def __init__(self, policy: Policy, mtp_layer: int):
        self._rules = [
            (re.compile(fnmatch.translate(pattern.replace("{mtp}", str(mtp_layer)))), pattern, format)
            for pattern, format in policy.rules
        ]
        self._policy = policy
        self._effects = {pattern: UNMATCHED for pattern, _ in policy.rules}
        self.impossible: list[tuple[str, str]] = []

    def choose(self, stored: StoredWeight) -> StoredWeight:
        """Return `stored` with the format to convert it to, if any."""
        matching = [(pattern, format) for regex, pattern, format in self._rules if regex.match(stored.name)]
        (pattern, format), *overruled = matching or [("", self._policy.otherwise)]
        applies = format == KEEP or _applies(pattern, format, stored)
        self._note_effect(pattern, EFFECTIVE if applies else UNQUANTIZED)
        for other, _ in overruled:
            self._note_effect(other, OVERRULED)
        if format == KEEP or stored.is_in(format) or not applies:
            return stored
        if reason := _find_obstacle(stored, format):
            self.impossible.append((stored.name, reason))
            return stored
        return dataclasses.replace(stored, wanted=format)

    def list_notes(self) -> list[str]:
        """Return notes on a file: what the format beside it applies to, and each pattern that had no effect. Raises
        UsageError if none had any."""
        if self._policy.file is None:
            return []
        effects = [(pattern, effect) for pattern, effect in self._effects.items() if effect < EFFECTIVE]
        notes = [INEFFECTIVE[effect].format(pattern=pattern) for pattern, effect in effects]
        if notes and len(notes) == len(self._effects) and self._policy.otherwise == KEEP:
            reasons = f"no pattern of the policy {self._policy.file} has an effect: {listing(notes)}"
            raise UsageError(f"{reasons}. Nothing was converted")
        if self._policy.otherwise != KEEP:
            to = argument("to", self._policy.otherwise)
            notes.append(f"its patterns come first: {to} is for weights that match none")
        return [f"{self._policy.file}: {note}" for note in notes]

    def _note_effect(self, pattern: str, effect: int) -> None:
        if pattern in self._effects:
            self._effects[pattern] = max(effect, self._effects[pattern])


def _applies(pattern: str, format: str, stored: StoredWeight) -> bool:
    """Return whether a rule covers the weight: a linear, one named in full, or a quantized one to be dequantized."""
    words = stored.name.split(".")[-2:]
    if (words[0] in LINEARS and words[1] == "weight") or pattern.split(".")[-2:] == words:
        return True
    return format == "bf16" and stored.format != "dense"


def _find_obstacle(stored: StoredWeight, format: str) -> str | None:
    """Return why the weight cannot be stored in `format`, if so."""
    if format == "bf16":
        return None
    if len(stored.shape) != 2:
        return f"{list(stored.shape)} is not a matrix"
    if EMBEDDING in stored.name:
        return "its rows are looked up"
    if format == "nvfp4" and stored.shape[1] % NVFP4_BLOCK:
        return f"its {stored.shape[1]} inputs are not a multiple of {NVFP4_BLOCK}"
    return None
