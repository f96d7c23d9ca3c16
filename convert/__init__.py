"""The job: safetensors -> Orbax, ready for a CPU or an accelerator mesh.

`convert(src, dst)` is the whole of it; `main(argv)` is the command line (`python -m convert SRC DST`).
"""

from .command import main
from .job import Progress, convert

__all__ = ["Progress", "convert", "main"]
