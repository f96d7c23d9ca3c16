"""How fast a checkpoint reaches the devices: `python -m tests.gpu_load [FOLDER] [--mesh AXES] [--layers N]`.

Writes a random checkpoint at true layer dimensions to FOLDER, unless there is one (two layers: 10.5 GB), and prints
GB/s of loading it from the page cache beside `device_put` of an array in memory. On a CPU a mapped load is timed too.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import dsv32_jax as ds
from configs import path
from convert.transform.cut import LeafFormat, list_arrays
from convert.write.pipeline import describe_array
from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest, is_complete
from dsv32_jax.checkpoint.random_weights import storage
from dsv32_jax.checkpoint.reader import Reader, dtype_of
from dsv32_jax.checkpoint.writer import Writer
from dsv32_jax.config import Config
from dsv32_jax.layout import leaves
from dsv32_jax.system.host import get_peak_memory, get_resident_memory
from tests.convert import fakes

TILE = 1 << 24
ROUNDS = 3
IN_MEMORY = 1 << 30


def fill(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """An array whose bytes repeat random ones; scales are numbers between 2^-3 and 2^4."""
    array = np.empty(shape, dtype_of(dtype))
    if dtype in ("uint8", "float8_e4m3fn"):
        tile = rng.integers(0, 256, TILE, np.uint8) if dtype == "uint8" else rng.integers(0x20, 0x58, TILE, np.uint8)
    else:
        tile = (rng.standard_normal(TILE >> 3, np.float32) * 0.02).astype(array.dtype).view(np.uint8)
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, tile.size):
        flat[start : start + tile.size] = tile[: flat.size - start]
    return array


def write(folder: Path, cfg: Config) -> None:
    """A converted checkpoint of `cfg` with random NVFP4 weights, made without a source."""
    folder.mkdir(parents=True, exist_ok=True)
    writer, rng, entries = Writer(folder), np.random.default_rng(0), {}
    for number, leaf in enumerate(leaves(cfg)):
        kind = "nvfp4" if storage(leaf, np.float32) == "nvfp4" or "w_uk" in leaf.path or "w_uv" in leaf.path else ""
        form = LeafFormat("nvfp4", 16, "") if kind else LeafFormat("dense", 1, storage(leaf))
        arrays = {name: fill(shape, dtype, rng) for name, (dtype, shape) in list_arrays(leaf, form).items()}
        places = writer.save(f"{number:05d}", {(leaf.path, name): array for name, array in arrays.items()})
        entry = LeafEntry(form.format, {name: describe_array(array, leaf.stacked) for name, array in arrays.items()})
        entries[leaf.path] = entry.at(leaf.path, places)
    fakes.manifest(cfg.to_dict(), entries).write(folder)


def seconds(run: Callable[[], object]) -> float:
    """The fastest of some rounds."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        result = jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
        del result
    return min(found)


def count_read_bytes() -> int:
    """The bytes that this process has read so far, from disks or the page cache (Linux)."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def measure(folder: Path, mesh: jax.sharding.Mesh | None) -> None:
    """Print the figures of one checkpoint."""
    reader, device = Reader(folder, Manifest.read(folder).leaves), jax.devices()[0]
    nbytes = sum(entry.nbytes for entry in reader.entries.values())
    print(
        f"{device.device_kind}, {1 if mesh is None else mesh.size} of them: {nbytes / 1e9:.2f} GB in "
        f"{len(reader.entries)} arrays"
    )
    for key in reader.entries:
        for _ in reader.slabs(key):
            pass
    before = get_resident_memory()
    begun = count_read_bytes()
    copied = seconds(lambda: ds.load(folder, mesh=mesh, mapped=False))
    read = (count_read_bytes() - begun) / ROUNDS
    peak = get_peak_memory() - before - (nbytes if device.platform == "cpu" else 0)
    memory = np.ones(IN_MEMORY, np.uint8)
    put = IN_MEMORY / seconds(lambda: jax.device_put(memory, device)) / 1e9
    print(f"load {nbytes / copied / 1e9:.2f} GB/s ({copied:.2f} s), host memory beside the model {peak / 1e9:.2f} GB")
    print(f"a load reads {read / 1e9:.2f} GB of files")
    print(f"device_put of an array in memory {put:.2f} GB/s, ratio {nbytes / copied / 1e9 / put:.2f}")
    if device.platform == "cpu":
        print(f"mapped load {seconds(lambda: ds.load(folder, mesh=mesh)):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mesh")
    options = parser.parse_args()
    shape = {"num_hidden_layers": options.layers, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    cfg = dataclasses.replace(Config.from_json(path("deepseek_v32")), **shape)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not is_complete(folder):
            write(folder, cfg)
        measure(folder, None if options.mesh is None else ds.mesh(options.mesh))


if __name__ == "__main__":
    main()
