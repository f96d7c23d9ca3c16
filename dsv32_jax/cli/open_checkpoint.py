"""A converted checkpoint: first its config and tokenizer, to check a request before the weights are read."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..chat import Tokenizer
from ..checkpoint.companions import GENERATION, check_tokenizer, read_sampling
from ..checkpoint.load import load
from ..checkpoint.manifest import Manifest
from ..config import Config
from ..errors import CheckpointError, UsageError
from ..generation.engine_core import plan_rows
from ..generation.options import Sampling
from ..generation.request import Request, validate
from ..model.model import Model
from ..parallel import sharding
from ..system.compilation import require_device
from ..system.files import expand_path
from .terminal import Screen


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint without its weights. `tokenizer` is None where only token ids are used."""

    folder: Path
    cfg: Config
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, folder: str | Path, *, ids: bool = False) -> "OpenedCheckpoint":
        """Open the checkpoint in `folder`, without its tokenizer if `ids`. Raises CheckpointError or UsageError."""
        folder = expand_path(folder)
        cfg = Config.from_dict(Manifest.read(folder).config, f"the config in {folder.name}'s manifest")
        if ids:
            return cls(folder, cfg, None)
        try:
            return cls(folder, cfg, Tokenizer.load(folder, cfg))
        except (CheckpointError, UsageError) as error:
            raise type(error)(f"{error} (dsv32 generate --ids)") from error

    def choose_sampling(self, given: dict[str, Any], screen: Screen) -> dict[str, Any]:
        """Return the sampling parameters `given`, and for the others the checkpoint's defaults, which a note names."""
        chosen = vars(Sampling.from_checkpoint(self.folder, **given))
        defaults = {name: chosen[name] for name in read_sampling(self.folder) if name not in given}
        if defaults:
            values = ", ".join(f"{name} {value}" for name, value in defaults.items())
            screen.note(f"{GENERATION} of the checkpoint: {values}, unless options say otherwise")
        return {**defaults, **given}

    def validate(self, dtype: str, prompts: Any, sampling: Any = None, **options: Any) -> Request:
        """Validate a request, and that its cache fits in memory, before weights are read."""
        require_device()
        tokens = self.tokenizer.id_count if self.tokenizer else check_tokenizer(self.folder, self.cfg)
        request = validate(self.cfg, prompts, sampling, dtype=jnp.dtype(dtype), tokens=tokens, **options)
        plan_rows(self.cfg, request)
        return request

    def load(self, arguments: argparse.Namespace, screen: Screen) -> Model:
        """Load the model with the `--dtype`, `--mesh`, `--experts` and `--verify` of `arguments`."""
        mesh = None if arguments.mesh is None else sharding.mesh(arguments.mesh)
        start = time.perf_counter()
        dtype, experts, verify = jnp.dtype(arguments.dtype), arguments.experts, arguments.verify
        model = jax.block_until_ready(load(self.folder, mesh=mesh, dtype=dtype, experts=experts, verify=verify))
        formats, seconds = model.summary()[1]["formats"], time.perf_counter() - start
        screen.note(
            f"loaded {self.folder}: {formats} in {seconds:.1f} s, computing in {arguments.dtype} on "
            f"{1 if mesh is None else mesh.size} x {jax.devices()[0].device_kind}"
        )
        return model
