"""YaRN parameters (arXiv 2309.00071), and the ways in which a config.json spells rotary embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import listing

INT_MAX = 2**31 - 1
SMALLEST = 2.0**-126
"""The smallest normal number in float32: processors take smaller ones for zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN as DeepSeek applies it: at every length, also of short prompts."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


FIXED = {"attention_factor": 1, "truncate": True, "partial_rotary_factor": 1, "apply_yarn_scaling": True}
"""Keys with the only value that is supported, which follows from the others or is the default."""

KEYS = {"type", *FIXED, *(field.name for field in dataclasses.fields(Yarn))}
"""The keys that a normalized `rope_scaling` may have."""

PATHS = {f"rope_scaling.{key}" for key in KEYS - FIXED.keys()}


def normalize_rope(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return a config.json's object with `rope_theta` and, if it says anything of it, `rope_scaling`, which is None
    without scaling.

    transformers 5 writes both as `rope_parameters`, and some tools put `rope_theta` into `rope_scaling`. If two
    spellings disagree, that is added to `problems`.
    """
    raw, spellings = dict(raw), [name for name in ("rope_scaling", "rope_parameters") if raw.get(name) is not None]
    if "rope_parameters" in raw and not isinstance(raw["rope_parameters"], Mapping | None):
        problems.append(f"rope_parameters must be an object, not {raw['rope_parameters']!r}")
        spellings.remove("rope_parameters")
    found = []
    for name in spellings:
        scaling = raw[name]
        if isinstance(scaling, Mapping):
            scaling = dict(scaling)
            theta = scaling.pop("rope_theta", None)
            if theta is not None and raw.setdefault("rope_theta", theta) != theta:
                problems.append(f"rope_theta is {raw['rope_theta']!r}, but {theta!r} in {name}")
        found.append(_normalize_scaling(scaling))
    if len(found) == 2 and found[0] != found[1]:
        problems.append(f"rope_scaling ({found[0]!r}) and rope_parameters ({found[1]!r}) disagree")
    stated = raw.pop("rope_parameters", None) is not None or "rope_scaling" in raw
    return {**raw, "rope_scaling": found[0] if found else None} if stated else raw


def _normalize_scaling(scaling: Any) -> Any:
    """Name the type `type`, drop nulls, and return None if nothing but the type "default" is left."""
    if not isinstance(scaling, Mapping):
        return scaling
    values = {key: value for key, value in scaling.items() if value is not None}
    types = [values.pop(key) for key in ("type", "rope_type") if key in values]
    types = ["yarn" if kind == "deepseek_yarn" else kind for kind in types]
    kind = types[0] if types and types == types[:1] * len(types) else types or "default"
    return None if kind == "default" and not values else {"type": kind, **values}


def parse_yarn(raw: Any, problems: list[str]) -> Yarn | None:
    """Return the Yarn of a normalized `rope_scaling` object, or None after adding to `problems`."""
    if not isinstance(raw, Mapping):
        problems.append(f"rope_scaling must be an object or null, not {raw!r}")
        return None
    raw = dict(raw)
    if (kind := raw.pop("type", "default")) != "yarn":
        keys = listing(map(str, raw)) or "no other keys"
        problems.append(f"rope_scaling has the type {kind!r} (with {keys}); only yarn is supported")
        return None
    found = [
        f"rope_scaling.{key} is {raw[key]!r}, but only {value!r} is supported"
        for key, value in FIXED.items()
        if raw.get(key, value) != value
    ]
    fields = {field.name: field for field in dataclasses.fields(Yarn)}
    if missing := sorted(set(fields) - set(raw)):
        found.append(f"missing keys in rope_scaling ({len(missing)}): {listing(missing)}")
    values = {key: parse_number(key, field.type, raw[key], 1, found) for key, field in fields.items() if key in raw}
    if not found and values["mscale"] != values["mscale_all_dim"]:
        found.append(
            f"rope_scaling.mscale ({values['mscale']}) and mscale_all_dim ({values['mscale_all_dim']}) differ; "
            "reference implementations disagree on what that means"
        )
    problems += found
    return None if found else Yarn(**values)


def parse_number(name: str, kind: Any, value: Any, smallest: int, problems: list[str]) -> Any:
    """Return `value` as an int of at least `smallest` if `kind` is int, else as a positive float; or None after adding
    to `problems`."""
    if kind in (int, "int"):
        if type(value) is int and smallest <= value <= INT_MAX:
            return value
        problems.append(f"{name} must be an integer from {smallest} to {INT_MAX}, not {value!r}")
    elif type(value) in (int, float) and SMALLEST <= value <= INT_MAX:
        return float(value)
    else:
        problems.append(f"{name} must be a positive number that is not zero in float32, not {value!r}")
    return None
