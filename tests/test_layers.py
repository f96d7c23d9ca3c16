"""The floors of the design: a file imports only from lower floors, and what needs no JAX does not wait for it."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

FLOORS = (
    {"errors"},
    {"system"},
    {"config"},
    {"layout"},
    {"quantization"},
    {"kernels", "parallel"},
    {"model"},
    {"checkpoint"},
    {"generation"},
    {"inspect", "chat"},
    {"evaluation", "bench", "serve"},
    {"cli"},
)
"""The rooms of dsv32_jax from the ground up. A room imports from lower floors and from itself; rooms of one
floor do not import each other."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

WITHOUT_JAX = (
    "errors system.host config quantization.quantize layout checkpoint.companions quantization.scale_search "
    "checkpoint.random_checkpoint inspect.traces cli.app cli.demo chat checkpoint.reader checkpoint.writer "
    "parallel.partition checkpoint.manifest checkpoint.checksums "
    "inspect inspect.weights inspect.placements bench.measure chat.encoding "
    "chat.lenient_parser chat.tokenizer chat.conversation cli.parsers cli.terminal"
).split()
"""What `--help`, dry runs, the converter's plan and the demo's first half stand on."""

CONVERT_MAY_IMPORT = {"errors", "config", "layout", "system", "quantization", "parallel", "checkpoint"}
"""The rooms below the model. Of them the converter uses what needs neither JAX nor the model."""

CONVERT_MUST_NOT_IMPORT = {
    *("checkpoint.load", "checkpoint.random_weights", "quantization.formats", "parallel.sharding"),
    *("parallel.multihost", "system.compilation"),
}

ENTRANCES = {
    *("cli.app", "cli.demo", "inspect.weights"),
    *("bench.load", "bench.plan", "bench.kernels", "bench.engine"),
}
"""Where the library calls `convert` and reads `configs`."""


def files(package: str) -> dict[str, Path]:
    """Every file of `package` but the rooms' `__init__`, by its dotted name within the package."""
    folder = REPOSITORY / package
    found = {".".join(file.relative_to(folder).with_suffix("").parts): file for file in sorted(folder.rglob("*.py"))}
    return {name: file for name, file in found.items() if not name.endswith("__init__")}


def imports(text: str, module: str) -> set[str]:
    """The modules that `text`, the file of `module`, imports anywhere in it, with relative ones spelled out."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            assert above or not node.level, f"{module} reaches above its package"
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def rooms_used(text: str, package: str, name: str) -> set[str]:
    """The rooms of `package` (or files of its ground floor) that `text`, its file `name`, imports."""
    prefix = package + "."
    used = {found.removeprefix(prefix) for found in imports(text, prefix + name) if found.startswith(prefix)}
    return {found.partition(".")[0] for found in used}


def test_every_room_has_a_floor():
    """At most 12 floors; a new room takes its place in the table, a removed one leaves it."""
    assert {name.partition(".")[0] for name in files("dsv32_jax")} - {"__main__"} == set(FLOOR)
    assert len(FLOORS) <= 12


def test_the_ground_floor_is_small():
    """Whoever opens dsv32_jax/ sees rooms, and at most six files."""
    assert len(list((REPOSITORY / "dsv32_jax").glob("*.py"))) <= 6


def test_a_room_imports_only_from_lower_floors():
    """Imports inside functions count; an `__init__` names the files it loads lazily in its table."""
    upward = []
    for name, file in files("dsv32_jax").items():
        room = name.partition(".")[0]
        used = rooms_used(file.read_text(), "dsv32_jax", name) & set(FLOOR) if name != "__main__" else set()
        upward += [(name, other) for other in used if FLOOR[other] >= FLOOR[room] and other != room]
    assert not upward


def test_only_entrances_call_the_converter():
    """The library loads what the converter wrote and does not know how it came about."""
    outward = {
        name
        for name, file in files("dsv32_jax").items()
        for module in imports(file.read_text(), f"dsv32_jax.{name}")
        if module.split(".")[0] in ("convert", "configs", "tests")
        or module.split(".")[:2] in (["dsv32_jax", "convert"], ["dsv32_jax", "configs"])
    }
    assert outward <= ENTRANCES


def test_the_converter_knows_only_names_and_formats():
    """convert/ imports the lower floors, and neither JAX nor the model nor the presets."""
    upward = []
    for name, file in files("convert").items():
        used = imports(file.read_text(), f"convert.{name}")
        below = {module.removeprefix("dsv32_jax.") for module in used if module.startswith("dsv32_jax.")}
        rooms = {module.partition(".")[0] for module in below} & set(FLOOR) - CONVERT_MAY_IMPORT
        others = {module for module in used if module.startswith("dsv32_jax.convert")}
        others |= {module for module in used if module.split(".")[0] in ("jax", "flax", "orbax", "configs", "tests")}
        upward += [(name, module) for module in rooms | below & CONVERT_MUST_NOT_IMPORT | others]
    assert not upward


def in_order(needs: dict[str, set[str]]) -> list[str]:
    """The keys so that each comes after all it needs; AssertionError where they go in circles."""
    order: list[str] = []
    while len(order) < len(needs):
        ready = sorted(name for name, needed in needs.items() if name not in order and not needed - set(order))
        assert ready, f"import each other: {sorted(needs.keys() - set(order))}"
        order += ready
    return order


def test_the_converter_has_no_cycles():
    """Its files, and its rooms too, can be put in an order in which each builds on earlier ones."""
    known = {name: file for name, file in files("convert").items() if name != "__main__"}
    used = {
        name: {found.removeprefix("convert.") for found in imports(file.read_text(), f"convert.{name}")} & set(known)
        for name, file in known.items()
    }
    in_order(used)
    rooms: dict[str, set[str]] = {name.partition(".")[0]: set() for name in used if "." in name}
    for name, needed in used.items():
        if "." in name:
            rooms[name.partition(".")[0]] |= {other.partition(".")[0] for other in needed if "." in other}
    in_order({room: needed - {room} for room, needed in rooms.items()})


def test_every_room_is_in_the_wheel():
    """The build lists its packages by name: one that is not there would be missing after `pip install`."""
    listed = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    for package in ("dsv32_jax", "convert"):
        for folder in {file.parent.relative_to(REPOSITORY) for file in (REPOSITORY / package).rglob("*.py")}:
            name = ".".join(folder.parts)
            assert (name if package == "dsv32_jax" else f"dsv32_jax.{name}") in listed


def test_configs_import_nothing_of_the_package():
    """The presets are data."""
    modules = imports((REPOSITORY / "configs" / "__init__.py").read_text(), "configs.__init__")
    assert not {name for name in modules if name.startswith(("dsv32_jax", "convert", "jax"))}


def test_an_upward_import_is_seen():
    """The check can fail: plain, relative, from a room, and inside a function."""
    for line in ("from ..model.model import Model", "import dsv32_jax.model.model", "from .. import model"):
        for text in (line, f"def late():\n    {line}"):
            assert rooms_used(text, "dsv32_jax", "kernels.reference") == {"model"}, text
    assert rooms_used("from . import manifest", "dsv32_jax", "checkpoint.reader") == {"checkpoint"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A fresh Python in the repository that must end well."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_what_needs_no_jax_does_not_import_it():
    """Neither does `import dsv32_jax`, nor the converter."""
    modules = ["dsv32_jax", *(f"dsv32_jax.{name}" for name in WITHOUT_JAX), "convert", "configs"]
    done = run("-c", f"import sys, {', '.join(modules)}; print(sorted({{'jax', 'flax', 'orbax'}} & set(sys.modules)))")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    ["dsv32_jax --help", "convert --help", *(f"dsv32_jax {name} --help" for name in ("generate", "chat", "doctor"))],
)
def test_help_does_not_import_jax(command):
    """`--help` answers at once: -X importtime lists what was imported."""
    done = run("-X", "importtime", "-m", *command.split())
    assert "usage" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not {"jax", "flax", "orbax", "numpy.random"} & imported


def test_the_package_is_lazy_and_complete():
    """Every public name is where the table says; an unknown one is an AttributeError."""
    script = (
        "import sys, dsv32_jax\n"
        "assert 'jax' not in sys.modules\n"
        "names = dir(dsv32_jax)\n"
        "assert {'Config', 'load', 'forward', 'generate', 'stream', 'Sampling', 'Model'} <= set(names), names\n"
        "assert all(getattr(dsv32_jax, name) is not None for name in names)\n"
        "assert 'jax' in sys.modules\n"
        "assert getattr(dsv32_jax, 'nonsense', None) is None\n"
    )
    run("-c", script)


def test_the_version_is_known_without_installed_metadata():
    """As in a source tree that was copied, not installed."""
    hidden = (
        "import importlib.metadata, sys\n"
        "def missing(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = missing\n"
        "from dsv32_jax.cli.app import program\n"
        "sys.argv = ['dsv32', '--version']\n"
        "program()\n"
    )
    stated = re.search(r'__version__ = "(.+)"', (REPOSITORY / "dsv32_jax" / "__init__.py").read_text())
    assert stated and run("-c", hidden).stdout.strip() == f"dsv32_jax {stated[1]}"


def test_presets_are_reachable():
    """In a checkout as `configs`; where the package is installed also as `dsv32_jax.configs`."""
    import configs

    assert {"deepseek_v32", "tiny"} <= {file.stem for file in (REPOSITORY / "configs").glob("*.json")}
    assert configs.path("tiny").is_file()
    assert importlib.util.find_spec("convert") is not None
