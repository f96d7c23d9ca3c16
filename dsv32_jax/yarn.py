"""YaRN's parameters, and how a config.json spells them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .errors import listing

LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071) as DeepSeek applies it, at every length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


def one_spelling(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`raw` with `rope_parameters` (transformers 5) as `rope_scaling` and `rope_theta`; no scaling is None.

    Where both spellings are there and disagree, that is added to `problems`.
    """
    parameters = raw.pop("rope_parameters", None)
    if isinstance(parameters, Mapping):
        scaling = dict(parameters)
        theta = scaling.pop("rope_theta", raw.get("rope_theta"))
        if theta is not None and raw.setdefault("rope_theta", theta) != theta:
            problems.append(f"rope_theta is {raw['rope_theta']!r}, but rope_parameters says {theta!r}")
        if _normal(raw.setdefault("rope_scaling", scaling)) != _normal(scaling):
            problems.append(f"rope_scaling ({raw['rope_scaling']!r}) and rope_parameters ({scaling!r}) disagree")
    elif parameters is not None:
        problems.append(f"rope_parameters must be an object, not {parameters!r}")
    return {**raw, "rope_scaling": _normal(raw.get("rope_scaling"))}


def _normal(scaling: Any) -> Any:
    """`scaling` with its kind under `type` alone and without nulls; the kind `default` with nothing else is None."""
    if not isinstance(scaling, Mapping):
        return scaling
    values = {key: value for key, value in scaling.items() if value is not None}
    kinds = [values.pop(key) for key in ("type", "rope_type") if key in values]
    kind = kinds[0] if kinds and kinds == kinds[:1] * len(kinds) else kinds or "default"
    return None if kind == "default" and not values else {"type": kind, **values}


def parse(raw: Any, problems: list[str]) -> Yarn | None:
    """The Yarn of a `rope_scaling` object; None where something is wrong, which is added to `problems`."""
    if not isinstance(raw, Mapping):
        problems.append(f"rope_scaling must be an object or null, not {raw!r}")
        return None
    raw = dict(raw)
    if (kind := raw.pop("type", "default")) != "yarn":
        problems.append(
            f"rope_scaling is of type {kind!r} (with {listing(map(str, raw)) or 'nothing else'}); only yarn is known"
        )
        return None
    if raw.pop("truncate", True) is not True:
        problems.append("rope_scaling.truncate must be true")
    fields = {field.name: field for field in dataclasses.fields(Yarn)}
    if unknown := sorted(set(raw) - set(fields)):
        problems.append(f"unknown keys in rope_scaling ({len(unknown)}): {listing(unknown)}")
    if missing := sorted(set(fields) - set(raw)):
        problems.append(f"missing keys in rope_scaling ({len(missing)}): {listing(missing)}")
    before = len(problems)
    values = {key: number(key, field.type, raw[key], 1, problems) for key, field in fields.items() if key in raw}
    if missing:
        return None
    if len(problems) == before and values["mscale"] != values["mscale_all_dim"]:
        problems.append(
            f"rope_scaling.mscale ({values['mscale']}) and mscale_all_dim ({values['mscale_all_dim']}) differ; "
            "the references disagree about what that means"
        )
    return Yarn(**values) if len(problems) == before else None


def number(name: str, kind: Any, value: Any, smallest: int, problems: list[str]) -> Any:
    """`value` as a whole number (`kind` int) from `smallest`, or as a positive float; else a problem with its name."""
    if kind in (int, "int"):
        if type(value) is int and smallest <= value <= LARGEST:
            return value
        problems.append(f"{name} must be a whole number from {smallest} to {LARGEST}, not {value!r}")
    elif type(value) in (int, float) and 0 < value <= LARGEST:
        return float(value)
    else:
        problems.append(f"{name} must be a positive number, not {value!r}")
    return None
