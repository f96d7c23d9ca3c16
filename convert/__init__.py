"""Convert checkpoints: Hugging Face safetensors -> Orbax, laid out for a CPU or an accelerator mesh.

`convert(src, dst)` does the whole job. `main(argv)` is the command line (`python -m convert SRC DST`), and
`program(argv)` the same for a process that ends with it. All are imported on first use.
"""

from typing import TYPE_CHECKING

from dsv32_jax.system.lazy import attach

if TYPE_CHECKING:
    from dsv32_jax.system.progress import Progress as Progress

    from .command import main as main, program as program
    from .conversion import convert as convert

__getattr__, __dir__ = attach(__name__, __file__)
