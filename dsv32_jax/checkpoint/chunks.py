"""In which chunks an array is stored: what is read as one.

A chunk lies within the piece of one device, and is at most LARGEST bytes where that is possible; leading axes are cut
first, so that a chunk is contiguous. A stack is cut by expert: that is the axis which meshes split.
"""

import math

LARGEST = 64 << 20
SMALLEST = 256 << 10
"""Bytes: a stack is not cut by expert where an expert is smaller."""


def shape_of(piece: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The chunk shape of an array whose device pieces have the shape `piece`; it divides `piece`."""
    chunk = [max(1, size) for size in piece]
    if math.prod(chunk) * itemsize <= LARGEST:
        return tuple(chunk)
    if len(chunk) > 2 and math.prod(chunk[1:]) * itemsize >= SMALLEST:
        chunk[0] = 1
    for axis in range(len(chunk)):
        while chunk[axis] > 1 and math.prod(chunk) * itemsize > LARGEST:
            chunk[axis] //= _smallest_factor(chunk[axis])
    return tuple(chunk)


def _smallest_factor(size: int) -> int:
    return next((factor for factor in range(2, math.isqrt(size) + 1) if size % factor == 0), size)
