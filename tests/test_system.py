"""The machine around the model: files, sizes, free memory, cores, a user without a home."""

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv32_jax.checkpoint.reader import Reader
from dsv32_jax.errors import CheckpointError, UsageError
from dsv32_jax.system import array_file, files, host
from dsv32_jax.system.files import find_mismatches
from dsv32_jax.system.progress import Meter, Progress, format_duration, format_size, parse_size
from tests.conftest import REPOSITORY

GIB = 1 << 30


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "text, size",
    [
        *(("8GiB", 8 << 30), ("8 gb", 8 * 10**9), ("500M", 500 * 10**6), ("1.5GiB", 3 << 29), ("4096 B", 4096), (7, 7)),
        *(("141GB", 141 * 10**9), ("80 GiB", 80 << 30), ("7b", 7), ("1.5kB", 1500), (" 2TB ", 2 * 10**12)),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "8 apples", "GB", "-1GB", "GiB", "1 PB", "1e9", "nan", "9" * 400, 1.5e300, "8", "1.5", -1]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="invalid size .*8GB"):
        parse_size(text)


def test_sizes_and_times_are_short():
    assert [format_size(count) for count in (7, 1500, 1.2e9)] == ["7 B", "1.50 kB", "1.20 GB"]
    assert [format_duration(seconds) for seconds in (4, 75, 3600)] == ["0:04", "1:15", "1:00:00"]


@pytest.mark.parametrize(
    "width, line",
    [
        (None, " 38 %  120/313 GB  80 GB saved  200 MB/s  1:00 elapsed  16:05 left  layers.58.ffn.w_gate_EMD"),
        (100, " 38 %  120/313 GB  80 GB saved  200 MB/s  1:00 elapsed  16:05 left  layers.58.ffn.w_gate_EMD"),
        (80, " 38 %  ━━━━╌╌╌╌╌╌╌╌  120/313 GB  80 GB saved  200 MB/s  1:00 elapsed  16:05 left"),
        (60, " 38 %  120/313 GB  80 GB saved  200 MB/s  16:05 left"),
        (40, " 38 %  120/313 GB  200 MB/s  16:05 left"),
        (20, " 38 %  120/313 GB"),
        (4, " 38 "),
    ],
)
def test_progress_stays_on_one_line(width, line, monkeypatch):
    """The name gives way first, percentage and amounts stay; a bar takes what is left."""
    clock = iter([0.0, 0.0, *[60.0] * 3])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meter = Meter()
    for done in (108, 120):
        meter.update(Progress(done * 10**9, 313 * 10**9, "layers.58.ffn.w_gate_EMD", 80 * 10**9))
    assert meter.describe(width) == line and len(line) <= (width or 100)


def test_the_rate_is_that_of_the_last_minute(monkeypatch):
    """It follows a disk that slows down, without jumping; the time left follows the rate."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter, done = Meter(), 0
    for second in range(300):
        now[0], done = float(second), done + (100 if second < 200 else 50)
        meter.update(Progress(done, 100_000, unit="tokens"))
    assert 45 < meter.rate < 55 and meter.seconds_left == (100_000 - done) / meter.rate
    assert "tokens/s" in meter.describe() and meter.describe_saved() == "Nothing is saved yet"


# -------------------------------------------------------------------------------------------------------------- memory


def machine(root: Path, groups: str, available: int = 20 * GIB, version: str = "") -> Path:
    """Make a fake /proc below `root` and return where control groups of a version are mounted."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 90 kB\nMemAvailable:   {available >> 10} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root / "sys/fs/cgroup" / version


def group(folder: Path, limit: int | str, usage: int, **cached: int) -> None:
    """Make a control group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in cached.items()))


def test_a_control_group_is_a_limit(tmp_path):
    """One without a limit, or without figures, is none."""
    mount = machine(tmp_path, "0::/\n", 2 * GIB)
    assert host.get_free_memory(tmp_path) == 2 * GIB
    group(mount, "max", 5)
    assert host.get_free_memory(tmp_path) == 2 * GIB
    group(mount, GIB, GIB >> 2)
    assert host.get_free_memory(tmp_path) == 3 * GIB >> 2
    (mount / "memory.stat").unlink()
    assert host.get_free_memory(tmp_path) == 3 * GIB >> 2
    (tmp_path / "proc/self/cgroup").unlink()
    assert host.get_free_memory(tmp_path) == 3 * GIB >> 2


@pytest.mark.parametrize("nested", ["user.slice/job.scope", "user.slice"])
def test_the_own_group_and_those_around_it_are_limits(tmp_path, nested):
    """The tightest of them counts, whichever level it is at."""
    mount = machine(tmp_path, "0::/user.slice/job.scope\n")
    for folder in ("user.slice/job.scope", "user.slice", "other"):
        group(mount / folder, "max", 1 * GIB)
    assert host.get_free_memory(tmp_path) == 20 * GIB
    group(mount / nested, 4 * GIB, 1 * GIB)
    group(mount / "other", 2 * GIB, 1 * GIB)
    assert host.get_free_memory(tmp_path) == 3 * GIB


def test_page_cache_is_free(tmp_path):
    """The kernel drops it when memory is needed; dirty or anonymous memory stays."""
    mount = machine(tmp_path, "0::/job\n")
    cached = {"inactive_file": 4 * GIB, "active_file": 2 * GIB, "slab_reclaimable": GIB}
    group(mount / "job", 8 * GIB, 15 * GIB // 2, anon=GIB // 2, **cached)
    assert host.get_free_memory(tmp_path) == 15 * GIB // 2


@pytest.mark.parametrize("path", ["/docker/1234", "/../job"])
def test_a_container_sees_its_own_group_at_the_mount(tmp_path, path):
    """The path is one of the host's, which is not below the container's mount."""
    group(machine(tmp_path, f"0::{path}\n"), 4 * GIB, 1 * GIB)
    assert host.get_free_memory(tmp_path) == 3 * GIB


def test_control_groups_of_version_1(tmp_path):
    """The controller of memory has a mount and a path of its own."""
    mount = machine(tmp_path, "11:cpu,cpuacct:/job\n4:memory:/batch/job\n0::/init\n", version="memory")
    for folder, limit in (("batch/job", 1 << 62), ("batch", 4 * GIB)):
        (mount / folder).mkdir(parents=True, exist_ok=True)
        (mount / folder / "memory.limit_in_bytes").write_text(str(limit))
        (mount / folder / "memory.usage_in_bytes").write_text(str(3 * GIB))
        (mount / folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_rss 5\n")
    assert host.get_free_memory(tmp_path) == 2 * GIB


def test_a_group_above_its_limit_has_nothing_free(tmp_path):
    group(machine(tmp_path, "0::/\n"), GIB, 2 * GIB)
    assert host.get_free_memory(tmp_path) == 0


def test_this_machine_has_memory():
    assert 0 < host.get_free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < host.get_resident_memory() < 1 << 40


def test_a_machine_without_proc(tmp_path, monkeypatch):
    """macOS: all memory counts as free, the largest that a process had as what it has, every core is usable."""
    assert host.get_free_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.count_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert host.count_cores() == 1


def test_instructions_are_those_of_the_processor(tmp_path):
    """As Linux lists them; where nothing does, none are known."""
    (tmp_path / "new").write_text("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n")
    (tmp_path / "old").write_text("flags\t\t: fpu avx2 fma\n")
    assert [host.has_avx512_bf16(tmp_path / name) for name in ("new", "old", "none")] == [True, False, False]


# --------------------------------------------------------------------------------------------------------------- files


def test_only_regular_files_are_opened(tmp_path):
    """A FIFO would block, a folder cannot be read; links lead where they lead."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            files.open_regular(path)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert files.read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(CheckpointError, match="has 5 bytes; the limit is 4"):
        files.read_regular(tmp_path / "file", 4)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """Another process that reads it finds the old or the new; nothing else is left in the folder."""
    file = tmp_path / "file"
    files.write_file(file, b"old")
    with pytest.raises(KeyboardInterrupt), files.replace_file(file) as new:
        new.write_bytes(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with files.replace_file(file) as one, files.replace_file(file) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
        assert file.read_bytes() == b"old" and one.parent == other.parent == tmp_path
    assert file.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    os.umask(before := os.umask(0))
    return before


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "file").symlink_to("precious")
    files.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "file").is_symlink()


def test_checksums(tmp_path):
    """Of a file, and of buffers one after the other."""
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.hash_chunks([b"a", bytearray(b"bc")]) == known
    assert Reader(tmp_path, {}).measure_file("file") == [3, known]


def test_json_of_a_file_names_the_file(tmp_path):
    file = tmp_path / "file.json"
    for text, problem in (('{"a": 1, "a": 2}', "duplicate keys: 'a'"), ("[NaN]", "NaN"), ("[" * 100_000, "recursion")):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: not valid JSON: .*{problem}"):
            files.read_json(file, 1 << 20)
    file.write_text("[[], [], []]")
    assert files.read_json(file, 12) == [[], [], []]
    with pytest.raises(CheckpointError, match="4 lists, at most 3 are allowed"):
        files.read_json(file, 12, files.JsonLimits(lists=3))
    with pytest.raises(CheckpointError, match="12 bytes; the limit is 11"):
        files.read_json(file, 11)


NO_HOME = """
import os, pwd
def nobody(*_): raise KeyError("nobody")
pwd.getpwuid = pwd.getpwnam = nobody
for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "JAX_COMPILATION_CACHE_DIR"): os.environ.pop(name, None)
"""


def test_a_user_without_a_home(tmp_path):
    """A container's numeric user: nothing is cached and that is said, nothing else changes."""
    script = (
        f"{NO_HOME}\n"
        "from dsv32_jax import cli\n"
        "from dsv32_jax.system import compilation, files\n"
        "import jax\n"
        "assert files.find_home() is files.find_user_folder('XDG_CACHE_HOME', '.cache') is None\n"
        "compilation.enable_cache()\n"
        "compilation.enable_cache()\n"
        "assert jax.config.jax_compilation_cache_dir is None\n"
        "raise SystemExit(cli.main(['doctor']))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiled programs are not cached: there is no home folder") == 1
    assert "free disk, here" in done.stdout and "free disk, home" not in done.stdout


def test_programs_that_are_read_from_the_cache_are_counted(tmp_path):
    """They are programs too."""
    script = (
        "import jax, jax.numpy as jnp\n"
        "from dsv32_jax.system import compilation\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "array = jnp.ones(3)\n"
        "for loads in (0, 1):\n"
        "    with compilation.count_compilations() as counter:\n"
        "        jax.jit(lambda x: x * 2 + 1)(array)\n"
        "    assert (counter.count, counter.loads) == (1, loads), counter\n"
        "    jax.clear_caches()\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------- files of this package


@pytest.mark.parametrize(
    "value, found",
    [
        ({"a": 1, "b": [{"c": "x"}], "d": {"x": None, "y": 2}, "more": 3}, []),
        (
            {"a": True, "b": [{"c": 1}, {}, 3], "d": {"x": 1.5}},
            [
                "v.a is True",
                "v.b[0].c is 1",
                "v.b[1].c is missing",
                "v.b[2] is 3",
                "v.d.x is 1.5",
            ],
        ),
        ({"b": {}, "d": []}, ["v.a is missing", "v.b is {}", "v.d is []"]),
        ([], ["v is []"]),
        (None, ["v is None"]),
    ],
)
def test_everything_that_is_of_another_form_is_listed(value, found):
    form = {"a": int, "b": [{"c": str}], "d": {str: (int, type(None))}}
    assert find_mismatches(value, form, "v") == found


def test_every_byte_of_a_file_of_arrays_is_covered(tmp_path):
    """Changed or cut, it is refused, unless what it says is the same: a header may hold more spaces."""
    file, kind, form = tmp_path / "file", "dsv32_jax session 0", {"tokens": [int]}
    arrays = {"a": np.arange(5, dtype=np.int16), "b": np.zeros((2, 0), np.float32), "c": np.ones(3, np.float32)}
    array_file.write_arrays(file, kind, {"tokens": [1, 2]}, arrays)
    raw, refused = file.read_bytes(), 0
    for at in range(len(raw)):
        for changed in (raw[:at], *(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :] for bit in (at % 8, 5))):
            file.write_bytes(changed)
            try:
                facts, found = array_file.read_arrays(file, kind, form)
            except CheckpointError as error:
                assert str(file) in str(error)
                refused += 1
            else:
                assert facts == {"tokens": [1, 2]} and found.keys() == arrays.keys()
                assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert refused >= 3 * len(raw) - 16


@pytest.mark.parametrize(
    "facts, said", [("{", "is not a session"), ("[" * 100_000, "is not a session"), ("[]", "damaged")]
)
def test_facts_that_are_none(facts, said, tmp_path):
    """Under the right SHA-256."""
    about = {"kind": "dsv32_jax session 0", "facts": facts, "sha256": array_file._hash(facts, {})}
    save_file({}, tmp_path / "file", about)
    with pytest.raises(CheckpointError, match=said):
        array_file.read_arrays(tmp_path / "file", "dsv32_jax session 0", {"tokens": [int]})
