"""The C++ kernels of dsv32_jax/kernels/src: optional, as everything works without. The rest is in pyproject.toml."""

from pathlib import Path

import jaxlib
from setuptools import Extension, setup

HEADERS = Path(jaxlib.__file__).parent / "include"
SOURCES = Path("dsv32_jax", "kernels", "src")

setup(
    ext_modules=[
        Extension(
            "dsv32_jax.kernels._cpu",
            [str(SOURCES / name) for name in ("attention.cc", "dot.cc", "host.cc")],
            depends=[str(file) for file in (*SOURCES.glob("*.h"), *SOURCES.glob("*.inc"))],
            include_dirs=[str(HEADERS)],
            extra_compile_args=["-std=c++17", "-O3"],
            optional=True,
        )
    ]
)
