"""Results of the command line as lines for a person."""

from typing import Any

from dsv32_jax.system.quantities import duration_text, size_text

SIZES = ("would_read", "would_write", "peak_memory", "memory_limit", "memory_free", "disk_free", "largest_leaf")
SPEEDS = ("read_speed", "write_speed")


def lines(result: dict[str, Any]) -> str:
    """`result` one fact a line."""
    found = []
    for key, value in result.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            found += [f"{name}:"] if value else []
            found += [f"  {item}: {_number(count)}" for item, count in value.items()]
        elif isinstance(value, list):
            found += [f"{name[:-1]}: {item}" for item in value]
        else:
            found.append(f"{name}: {_fact(key, value)}")
    return "\n".join(found)


def summary(config: dict[str, Any], formats: dict[str, int], notes: list[str], ignored: dict[str, int]) -> dict:
    """What every result has."""
    layers = f"{config['num_hidden_layers']} + {config.get('num_nextn_predict_layers', 0)} MTP"
    return {"layers": layers, "formats": formats, "notes": notes, "ignored": ignored}


def _fact(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if key in SIZES:
        return size_text(value)
    if key in SPEEDS:
        return f"{size_text(value)}/s"
    return duration_text(value) if key.endswith("seconds") else str(value)


def _number(value: Any) -> str:
    """Errors are the only fractions in a table."""
    return f"{100 * value:.2f} %" if isinstance(value, float) else str(value)
