"""What every test runs under: strict dtypes, eight virtual CPU devices, no compiled programs on the user's disk."""

import os
import shutil
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

from dsv32_jax.config import Config
from tests import golden

IN_MEMORY = Path("/dev/shm")
if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))
"""Folders of tests are in memory where there is room: on a disk half the suite waits for what is flushed to it."""

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
"""Under nohup and in the background of a script these are ignored, and so they would be by what tests start."""

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("suite")

QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
"""What makes XLA compile in half the time; what tests start inherits it."""

REPOSITORY = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
NOWHERE = Path("nowhere")


def pytest_addoption(parser):
    """`--shared PATH`: also run every golden case found in PATH/golden and PATH/golden_nvfp4. `--notebooks`: run them
    all, which takes two minutes. `--sanitizers`: compile kernels with sanitizers and run that. `--fuzz SECONDS`: how
    long damaged input is tried."""
    parser.addoption("--fuzz", type=float, default=5, metavar="SECONDS", help="how long to try damaged input")
    parser.addoption("--notebooks", action="store_true", help="run every notebook")
    parser.addoption("--sanitizers", action="store_true", help="run the kernels under sanitizers")
    parser.addoption("--shared", type=Path, default=None, metavar="PATH", help="folder of the whole golden sets")


def pytest_configure(config):
    """Most of the suite's time is compilation, and most of that is making programs fast: only the whole sets have fast
    ones."""
    if config.getoption("--shared") is None:
        os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *QUICK])


def pytest_generate_tests(metafunc):
    """One test for each golden checkpoint: those in tests/data, and with --shared all of that folder instead."""
    shared = metafunc.config.getoption("--shared")
    if "case" in metafunc.fixturenames:
        folders = golden.cases(shared or DATA)
        assert folders, f"there are no golden cases in {shared or DATA}"
        wanted = getattr(metafunc.function, "needs", lambda folder: True)
        chosen = [folder for folder in folders if wanted(folder)] or [NOWHERE]
        metafunc.parametrize("case", chosen, indirect=True, ids=[folder.name for folder in chosen], scope="session")


def pytest_collection_modifyitems(config, items):
    """A golden test that no case is for is not collected."""
    nowhere = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("case") == NOWHERE]
    if nowhere:
        config.hook.pytest_deselected(items=nowhere)
        items[:] = [item for item in items if item not in nowhere]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, tests that share compiled programs run in one process: those of a golden case, and those of a file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByProgram(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return test.partition("[")[2] if file.endswith("test_golden.py") else file

    return ByProgram(config, log)


MOST_MAPS = 20_000
"""Linux gives a process 65,530 memory maps. XLA takes some for each program, and crashes if there are no more."""


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs of the files before are dropped once they are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _restore_signals():
    """A command that is run to its end ignores signals from then on, and so would the processes of later tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number in numbers:
        if signal.getsignal(number) is not before[number]:
            signal.signal(number, before[number])


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> Path:
    """A folder for what is made once and used by many tests."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def case(request, scratch) -> golden.Case:
    """A golden checkpoint, converted and loaded in float32 when first used, and what the reference made of it."""
    return golden.case(request.param, scratch)


@pytest.fixture(scope="session")
def units(request) -> dict:
    """The operator vectors at real sizes."""
    return golden.read((request.config.getoption("--shared") or DATA) / "golden/units_realdims/units.safetensors")


@pytest.fixture(scope="session")
def nvfp4_units(request) -> dict:
    """Small matrices as the real quantizers store them."""
    return golden.read((request.config.getoption("--shared") or DATA) / "golden_nvfp4/nvfp4_units/units.safetensors")


@pytest.fixture(scope="session")
def tiny() -> Config:
    """The preset in which every size is different."""
    return Config.from_json(REPOSITORY / "configs" / "tiny.json")


@pytest.fixture(scope="session")
def real() -> Config:
    """DeepSeek-V3.2 itself."""
    return Config.from_json(REPOSITORY / "configs" / "deepseek_v32.json")


def pytest_sessionfinish(session):
    """A process of several hands its figures to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = golden.figures


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Take in what a process has handed over."""
    golden.figures.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_terminal_summary(terminalreporter):
    """The largest difference from the reference, for each golden case."""
    if golden.figures:
        terminalreporter.section("golden figures (largest difference in float32 unless named otherwise)")
        for name, row in golden.figures.items():
            terminalreporter.line(name + ": " + ", ".join(f"{what} {value:.2g}" for what, value in row.items()))
