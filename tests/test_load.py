"""Loading: on a CPU weights are maps of the files, elsewhere copies, and damage is told before it is used."""

import bisect
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import dsv32_jax as ds
from convert.export.reshard import reshard
from dsv32_jax.checkpoint import load as loading, random_checkpoint, reader as reading
from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.checkpoint.weight_shapes import ABSORBED
from dsv32_jax.checkpoint.writer import Writer
from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, VerificationError
from dsv32_jax.system import reporter
from dsv32_jax.system.files import sync
from tests.convert import fakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny) -> Path:
    """A model whose arrays are large enough to be aligned in any cut: NVFP4, two layers, MTP."""
    sizes = dict(
        num_hidden_layers=2, num_attention_heads=4, n_routed_experts=8, n_group=4, topk_group=2, vocab_size=256,
        hidden_size=256, moe_intermediate_size=128, intermediate_size=256,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("load")
    random_checkpoint.write(root / "hf", Config.from_dict(tiny.to_dict() | sizes), "nvfp4")
    convert.convert(root / "hf", root / "out", group_bytes=200_000)
    return root / "out"


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A checkpoint that may be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def weights(model) -> dict[str, jax.Array]:
    """The arrays of a model by their paths, each once."""
    found = {jax.tree_util.keystr(path): array for path, array in jax.tree_util.tree_leaves_with_path(model)}
    return dict({id(array): (path, array) for path, array in found.items()}.values())


class Maps:
    """The memory maps of this process. Where there are many, reading them takes long."""

    def __init__(self):
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        self._starts = [int(line[0].partition("-")[0], 16) for line in lines]
        self._stops = [int(line[0].partition("-")[2], 16) for line in lines]
        self._files = [line[5] if len(line) > 5 else "" for line in lines]

    def file_at(self, pointer: int) -> str:
        """The file that memory is a map of, empty where it is none."""
        i = bisect.bisect_right(self._starts, pointer) - 1
        return self._files[i] if i >= 0 and pointer < self._stops[i] else ""

    def files_of(self, array: jax.Array) -> list[str]:
        """The file that each shard of `array` is a map of."""
        return [self.file_at(shard.data.unsafe_buffer_pointer()) for shard in array.addressable_shards]


def test_weights_are_maps_of_the_files(folder):
    """All but W^UK and W^UV, which are computed: at the very addresses."""
    found = weights(ds.load(folder))
    maps = Maps()
    for path, array in found.items():
        (file,) = maps.files_of(array)
        if any(name in path for name in ABSORBED):
            assert not file.startswith(str(folder))
        else:
            assert file.startswith(str(folder / "weights")) and Path(file).read_bytes() == np.asarray(array).tobytes()


def test_copies_have_the_same_bits(folder):
    mapped, copied = weights(ds.load(folder)), weights(ds.load(folder, mapped=False))
    assert mapped.keys() == copied.keys() and len(mapped) > 60
    maps = Maps()
    for path, array in mapped.items():
        assert array.dtype == copied[path].dtype and np.asarray(array).tobytes() == np.asarray(copied[path]).tobytes()
        assert not any(file.startswith(str(folder)) for file in maps.files_of(copied[path]))


@pytest.mark.parametrize("ahead", [0, 1 << 16])
def test_arrays_are_read_ahead_of_their_devices(ahead, folder, monkeypatch):
    """AHEAD_BYTES, or two arrays; each byte once."""
    monkeypatch.setattr(loading, "AHEAD_BYTES", ahead)
    monkeypatch.setattr(reading, "SLAB_BYTES", 3000)
    begun, finished, most, read = [0], [0], [0], [0]
    lock = threading.Lock()
    start, place, preadv = loading._Copies.__init__, loading._Copies.place, os.preadv

    def starting(self, *arguments):
        start(self, *arguments)
        begun[0] += sum(part.nbytes for part in self._parts.values())
        most[0] = max(most[0], begun[0] - finished[0])

    def finishing(self):
        arrays = place(self)
        finished[0] += sum(array.nbytes for array in arrays)
        return arrays

    def counted(descriptor, buffers, offset):
        done = preadv(descriptor, buffers, offset)
        with lock:
            read[0] += done
        return done

    monkeypatch.setattr(loading._Copies, "__init__", starting)
    monkeypatch.setattr(loading._Copies, "place", finishing)
    monkeypatch.setattr(os, "preadv", counted)
    copied = weights(ds.load(folder, mapped=False))
    arrays = [array.nbytes for leaf in Manifest.read(folder).leaves.values() for array in leaf.arrays.values()]
    assert most[0] <= max(ahead, 2 * max(arrays))
    assert begun[0] == finished[0] == read[0] == sum(arrays)
    monkeypatch.undo()
    for path, array in weights(ds.load(folder)).items():
        assert np.asarray(array).tobytes() == np.asarray(copied[path]).tobytes()


@pytest.mark.parametrize("laid_out_for", ["", "expert=4,model=2", "expert=2"])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("sizes", ["expert=4", "expert=2,model=2"])
def test_any_mesh_slices_any_checkpoint(sizes, mapped, laid_out_for, folder, tmp_path):
    """Cut along their first axis, or as they lie, shards are maps; others are copied."""
    source = folder
    if laid_out_for:
        reshard(folder, source := tmp_path / "out", laid_out_for)
    whole, found = weights(ds.load(folder)), weights(ds.load(source, mesh=ds.mesh(sizes), mapped=mapped))
    maps, count = Maps(), 0
    for path, array in found.items():
        assert np.asarray(array).tobytes() == np.asarray(whole[path]).tobytes()
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(whole[path])[shard.index].tobytes()
        files = maps.files_of(array)
        count += sum(file.startswith(str(source)) for file in files)
        if mapped and "w_gate_EMD.codes" in path and sizes == "expert=4" and not laid_out_for.endswith("model=2"):
            assert all(file.startswith(str(source)) for file in files)
        if mapped and "w_down_EDM.codes" in path and sizes == "expert=2,model=2" and laid_out_for.endswith("model=2"):
            assert len(set(files)) == 2
    assert bool(count) == mapped


def test_devices_of_one_part_share_its_memory(folder):
    array = ds.load(folder, mesh=ds.mesh("expert=4")).head_VD
    assert len(array.addressable_shards) == 4
    assert len({shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}) == 1


def test_files_are_never_written(folder):
    """A program that may reuse its arguments' memory takes other memory than a map's."""
    before = {file: file.read_bytes() for file in folder.rglob("c.*")}
    model = ds.load(folder)
    doubled = jax.jit(lambda array: array * 2, donate_argnums=0)(model.norm_D)
    assert float(jnp.abs(doubled).sum()) > 0
    assert before == {file: file.read_bytes() for file in before}


def test_several_load_at_once(folder):
    """In threads; with a converter that finds its work done."""
    with ThreadPoolExecutor(4) as pool:
        done = pool.submit(convert.convert, folder.parent / "hf", folder, group_bytes=200_000)
        models = list(pool.map(lambda mapped: weights(ds.load(folder, mapped=mapped)), (True, False, True)))
        assert done.result() == Manifest.read(folder)
    for model in models[1:]:
        assert all(np.array_equal(np.asarray(array), np.asarray(models[0][path])) for path, array in model.items())


def test_loaders_beside_a_converter(folder, tmp_path, monkeypatch):
    """Whoever loads what another process is writing is told so, before the first part, between parts, and until the
    manifest; then two load it, checked in full, while another conversion finds its work done."""
    source, out, save = folder.parent / "hf", tmp_path / "out", Writer.save
    reached, go_on, parts = threading.Semaphore(0), threading.Semaphore(0), []

    def save_when_told(self, part, group):
        parts.append(part)
        reached.release()
        assert go_on.acquire(timeout=60)
        return save(self, part, group)

    monkeypatch.setattr(Writer, "save", save_when_told)
    with ThreadPoolExecutor(3) as pool:
        done = pool.submit(convert.convert, source, out, group_bytes=1 << 20, workers=1)
        while not done.done():
            if reached.acquire(timeout=0.1):
                for verify in (None, "full"):
                    with pytest.raises(CheckpointError, match=f"another process .pid {os.getpid()} .*is writing it"):
                        ds.load(out, verify=verify)
                go_on.release()
        assert len(parts) > 2
        again = pool.submit(convert.convert, source, out)
        models = list(pool.map(lambda _: weights(ds.load(out, verify="full")), range(2)))
        assert again.result() == done.result()
    for path, array in weights(ds.load(folder)).items():
        assert all(np.asarray(model[path]).tobytes() == np.asarray(array).tobytes() for model in models)


def test_a_load_leaves_everything_as_it_was(folder, copy, capfd):
    """Hooks, loggers, standard error; after a load that fails too."""

    def state():
        return sys.unraisablehook, sys.excepthook, logging.getLogger("absl").level, list(logging.root.handlers)

    before = state()
    ds.load(folder)
    next(copy.rglob("c.*")).unlink()
    with pytest.raises(VerificationError):
        ds.load(copy)
    assert state() == before and capfd.readouterr() == ("", "")


DAMAGE = ("short", "long", "missing", "link", "folder", "pipe")


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_told_before_anything_is_loaded(how, mapped, copy, tmp_path):
    file = max(copy.rglob("c.*"), key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    file.unlink()
    if how == "short":
        file.write_bytes(content[:-1])
    elif how == "long":
        file.write_bytes(content + b"0")
    elif how == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    name = re.escape(str(file.relative_to(copy)))
    with pytest.raises(VerificationError, match=f"^1 file of .* is not as written; nothing was loaded: {name} "):
        ds.load(copy, mapped=mapped)
    for level in ("quick", "full"):
        with pytest.raises(VerificationError, match=f"nothing was loaded: {name} "):
            ds.load(copy, mapped=mapped, verify=level)


def test_a_manifest_that_leads_elsewhere_is_refused(copy):
    def lead_elsewhere(raw: dict) -> None:
        files = next(array["files"] for leaf in raw["leaves"].values() for array in leaf["arrays"].values())
        files[0] = files[0].replace("weights/00000/", "weights/../../")

    fakes.edit_manifest(copy, lead_elsewhere)
    with pytest.raises(CheckpointError, match="is invalid .* Convert the original checkpoint again"):
        ds.load(copy)


SHARED = """
import re, sys, jax, numpy as np, dsv32_jax as ds
model = ds.load(sys.argv[1])
total = sum(int(np.asarray(array).view(np.uint8).sum()) for array in jax.tree.leaves(model))
text = open("/proc/self/smaps").read()
blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
ours = [block for block in blocks if sys.argv[1] in block.split("\\n")[0]]
size = lambda name: sum(int(re.search(rf"^{name}:\\s+(\\d+)", block, re.M)[1]) for block in ours) * 1024
print(size("Rss"), size("Private_Dirty"), size("Anonymous"))
"""


def test_memory_is_that_of_the_page_cache(folder):
    """Another process maps the same pages of a disk: none of its own."""
    with tempfile.TemporaryDirectory() as disk:
        shutil.copytree(folder, Path(disk, "out"))
        for file in Path(disk).rglob("*.*"):
            sync(file)
        command = [sys.executable, "-c", SHARED, str(Path(disk, "out"))]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    resident, dirty, anonymous = map(int, done.stdout.split())
    arrays = [array.nbytes for leaf in Manifest.read(folder).leaves.values() for array in leaf.arrays.values()]
    assert resident > 0.8 * sum(arrays) and dirty == anonymous == 0


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("after, terminal", [(0, True), (1e9, True), (0, False)])
def test_a_slow_load_shows_a_bar_on_a_terminal(after, terminal, folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setattr(loading, "show_slow", lambda total: reporter.show_slow(total, after))
    ds.load(folder, mapped=False)
    shown = sys.stderr.getvalue()
    assert bool(shown) == (terminal and not after)


def test_a_log_shows_what_is_slow_in_lines(monkeypatch, capsys):
    """Every half minute."""
    for interval in (1e9, 0):
        monkeypatch.setattr(reporter, "INTERVAL", interval)
        with reporter.show_slow(3, 0, "windows") as count:
            count(2)
        said = capsys.readouterr().err
        assert "67 %  2/3 windows" in said if not interval else not said


def test_what_takes_long_is_shown_before_a_part_is_done(monkeypatch):
    """And not any more when it has ended."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with reporter.show_slow(3, 0.01, "windows") as count:
        end = time.monotonic() + 20
        while "0/3 windows" not in sys.stderr.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    shown = sys.stderr.getvalue()
    count(1)
    assert "0/3 windows" in shown and sys.stderr.getvalue() == shown


def test_a_tokenizer_is_read_again_where_it_was_replaced(copy, tiny):
    """The count of its ids is recorded for the one that was converted."""
    size = Manifest.read(copy).config["vocab_size"]
    for count in (size, size + 1):
        text = json.dumps({"model": {"vocab": {f"t{i}": i for i in range(count)}}})
        (copy / "tokenizer.json").write_text(text)
        if count > size:
            with pytest.raises(CheckpointError, match="does not belong to this model: its largest id is"):
                ds.load(copy)
        else:
            assert ds.load(copy).origin.tokens == size
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        ds.load(copy)
