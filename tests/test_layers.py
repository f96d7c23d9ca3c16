"""The floors of the design: a file imports only from lower floors, and what needs no JAX does not wait for it."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

FLOORS = (
    "errors chunks compilation measure",
    "yarn quantize arrays bands",
    "config quantize_search",
    "layout vocabulary",
    "passport pieces random_checkpoint",
    "manifest_text formats",
    "manifest",
    "integrity store",
    "ops random_weights",
    "sharding cache",
    "mla indexer experts",
    "moe",
    "attention",
    "block",
    "mtp checks",
    "model",
    "sampling checkpoint",
    "request",
    "generation",
    "bench_load",
    "bench bench_quantize demo",
    "cli",
    "__main__ __init__",
)
"""From the ground up; a floor's files do not import each other."""

FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

WITHOUT_JAX = (
    "errors chunks measure config quantize arrays bands layout vocabulary quantize_search passport pieces "
    "random_checkpoint manifest integrity cli demo bench_quantize"
).split()
"""What `--help`, dry runs, the converter's plan and the demo's first half stand on."""

CONVERT_MAY_IMPORT = {
    name for name in FLOOR if FLOOR[name] <= FLOOR["store"] and name not in ("formats", "random_checkpoint")
}
"""Names, formats on the host, manifest and store: the converter never sees the model."""

ENTRANCES = {"dsv32_jax.cli", "dsv32_jax.demo", "dsv32_jax.bench", "dsv32_jax.bench_load"}
"""Where the library calls `convert` and reads `configs`."""


def imports(file: Path, package: str) -> set[str]:
    """The modules that `file` imports, anywhere in it, with relative ones spelled out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            assert node.level <= 1, f"{file} reaches above its package"
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def siblings(file: Path, package: str, known) -> set[str]:
    """The files of `package` among what `file` imports."""
    prefix = package + "."
    return {name.split(".")[1] for name in imports(file, package) if name.startswith(prefix)} & set(known)


def files(package: str) -> dict[str, Path]:
    return {file.stem: file for file in sorted((REPOSITORY / package).glob("*.py"))}


def test_every_file_has_a_floor():
    """A new file takes its place in the table, a removed one leaves it."""
    assert set(files("dsv32_jax")) == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_a_file_imports_only_from_lower_floors(name):
    """Imports inside functions count; `__init__` names the files it loads lazily in its table."""
    above = {other for other in siblings(files("dsv32_jax")[name], "dsv32_jax", FLOOR) if FLOOR[other] >= FLOOR[name]}
    assert not above


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_only_entrances_call_the_converter(name):
    """The library loads what the converter wrote and does not know how it came about."""
    outward = {
        module
        for module in imports(files("dsv32_jax")[name], "dsv32_jax")
        if module.split(".")[0] in ("convert", "configs", "tests")
        or module.split(".")[:2] in (["dsv32_jax", "convert"], ["dsv32_jax", "configs"])
    }
    assert not outward or f"dsv32_jax.{name}" in ENTRANCES


@pytest.mark.parametrize("name", sorted(files("convert")))
def test_the_converter_knows_only_names_and_formats(name):
    """convert/ imports the lower floors, and neither JAX nor the model nor the presets."""
    used = imports(files("convert")[name], "convert")
    below = {module.split(".")[1] for module in used if module.startswith("dsv32_jax.")}
    assert below & set(FLOOR) <= CONVERT_MAY_IMPORT and "convert" not in below
    assert not {module for module in used if module.split(".")[0] in ("jax", "flax", "orbax", "configs", "tests")}


def test_the_converter_has_no_cycles():
    """Its files can be put in an order in which each builds on earlier ones."""
    known = files("convert")
    waiting = {name: siblings(file, "convert", known) for name, file in known.items() if name != "__main__"}
    while waiting:
        ready = {name for name, needed in waiting.items() if not needed & waiting.keys()}
        assert ready, f"import each other: {waiting}"
        waiting = {name: needed for name, needed in waiting.items() if name not in ready}


def test_configs_import_nothing_of_the_package():
    """The presets are data."""
    modules = imports(REPOSITORY / "configs" / "__init__.py", "configs")
    assert not {name for name in modules if name.startswith(("dsv32_jax", "convert", "jax"))}


def test_an_upward_import_is_seen(tmp_path):
    """The check can fail: plain, relative, and inside a function."""
    file = tmp_path / "ops.py"
    for line in ("from .model import Model", "import dsv32_jax.model", "from . import model"):
        for text in (line, f"def late():\n    {line}"):
            file.write_text(text)
            assert siblings(file, "dsv32_jax", FLOOR) == {"model"}, text


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


@pytest.mark.parametrize("command", ["dsv32_jax --help", "convert --help"])
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


def test_presets_are_reachable():
    """In a checkout as `configs`; where the package is installed also as `dsv32_jax.configs`."""
    import configs

    assert {"deepseek_v32", "tiny"} <= {file.stem for file in (REPOSITORY / "configs").glob("*.json")}
    assert configs.path("tiny").is_file()
    assert importlib.util.find_spec("convert") is not None
