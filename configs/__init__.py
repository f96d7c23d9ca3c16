"""Presets: config.json files in the checkpoint's own field names."""

from importlib import resources
from pathlib import Path


def path(name: str) -> Path:
    """Where the preset `name` ("deepseek_v32", "tiny") lies. Raises FileNotFoundError that lists what there is."""
    folder = Path(str(resources.files(__name__)))
    if not (file := folder / f"{name}.json").is_file():
        known = ", ".join(sorted(other.stem for other in folder.glob("*.json")))
        raise FileNotFoundError(f"there is no preset {name!r}; there are: {known}")
    return file
