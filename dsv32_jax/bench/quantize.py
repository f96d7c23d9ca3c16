"""`dsv32 bench quantize`: how many weights a second one core quantizes and dequantizes, and where the time goes."""

import time
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from ..quantization import quantize
from ..quantization.quantize import (
    E4M3,
    FP8_BLOCK,
    NVFP4_BLOCK,
    RTN,
    fp8_dequantize,
    fp8_quantize,
    nvfp4_dequantize,
    nvfp4_quantize,
)
from ..quantization.scale_search import SCALINGS
from .measure import Row, table

SHAPE = (2048, 7168)
"""One expert's gate of DeepSeek-V3.2."""

FEWEST_REPEATS = 3

EXPLANATION = """\
One thread, its own CPU time, the best of several runs. unit: multiples of what one vector operation takes (np.abs of a
piece in cache): NumPy makes a pass over the piece for each operation, so that is the bound. Indented: the steps of
bf16 -> nvfp4, rtn, on one piece."""

COLUMNS = (
    ("what", 32, lambda row: row["what"]),
    ("M/s", 8, lambda row: f"{1e-6 / row['seconds']:.0f}"),
    ("ns", 7, lambda row: f"{1e9 * row['seconds']:.2f}"),
    ("unit", 7, lambda row: f"{row['seconds'] / row['unit_seconds']:.1f}"),
)


def rows(shape: tuple[int, int] = SHAPE, seconds: float = 1.0) -> Iterator[Row]:
    """A row for each conversion of a Gaussian matrix and each step of one; `seconds` and `unit_seconds` a weight."""
    w = (np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    piece = np.ascontiguousarray(w.reshape(-1, NVFP4_BLOCK)[: quantize.PIECE // NVFP4_BLOCK].astype(np.float32).T)
    unit = best(lambda: np.abs(piece), seconds) / piece.size
    for count, named in ((w.size, _conversions(w)), (piece.size, _steps(piece))):
        for what, run in named.items():
            yield {"what": what, "seconds": best(run, seconds) / count, "unit_seconds": unit}


def print_rows() -> None:
    """The table, on stdout."""
    print(EXPLANATION + "\n")
    for line in table(COLUMNS, rows()):
        print(line, flush=True)


def best(run: Callable[[], object], seconds: float) -> float:
    """The least CPU time of `run`, repeated for about `seconds`, at least three times, after one call to warm up."""
    run()
    times: list[float] = []
    while len(times) < FEWEST_REPEATS or sum(times) < seconds:
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


def _conversions(w: np.ndarray) -> dict[str, Callable[[], object]]:
    """What the converter does to whole matrices."""
    values, grid = fp8_quantize(w)
    row_scale = np.repeat(grid, FP8_BLOCK, axis=0)[: len(w)]
    stored = nvfp4_quantize(w)

    def from_fp8():
        return fp8_dequantize(values, row_scale, ml_dtypes.bfloat16)

    scaled = {f"bf16 -> nvfp4, {name}": _quantizer(w, name) for name in SCALINGS}
    return {
        "fp8 -> bf16": from_fp8,
        **scaled,
        "fp8 -> bf16 -> nvfp4, rtn": lambda: nvfp4_quantize(from_fp8()),
        "nvfp4 -> bf16": lambda: nvfp4_dequantize(*stored, ml_dtypes.bfloat16),
        "bf16 -> fp8": lambda: fp8_quantize(w),
    }


def _quantizer(w: np.ndarray, name: str) -> Callable[[], object]:
    return lambda: nvfp4_quantize(w, SCALINGS[name])


def _steps(x: np.ndarray) -> dict[str, Callable[[], object]]:
    """What `nvfp4_quantize` does to one piece [16, n], step by step."""
    rows = np.ascontiguousarray(x.T)
    half = rows.astype(ml_dtypes.bfloat16)
    magnitude, tensor_scale = np.abs(x), np.float32(np.abs(x).max() / 2688)
    scale = RTN.choose(magnitude, tensor_scale)
    step = E4M3[scale.view(np.uint8)] * tensor_scale
    codes = quantize.packed(magnitude / step, x)
    return {
        "  largest magnitude": lambda: quantize.largest(half),
        "  to float32, blocks to columns": lambda: np.ascontiguousarray(half.astype(np.float32).T),
        "  magnitudes": lambda: np.abs(x),
        "  block scales": lambda: RTN.choose(magnitude, tensor_scale),
        "  quotients": lambda: magnitude / step,
        "  seven thresholds, signs, packing": lambda: quantize.packed(magnitude, x),
        "  columns to blocks": lambda: np.ascontiguousarray(codes.T),
    }
