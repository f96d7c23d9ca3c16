"""What a checkpoint holds of each weight, and everything that is missing, unknown, mismatched or not read."""

import collections
import re

from dsv32_jax.errors import CheckpointError, UsageError, listing
from dsv32_jax.layout import Leaf

from ..names import fold_details, fold_names
from ..read.detect import BESIDE, MissingTensors, detect
from ..read.header import Tensor
from ..read.stored import Stored
from .policy import Chooser

IGNORED = (
    (r".*\.input_scale", "activation scales: activations are not quantized"),
    (r".*\.input_global_scale", "activation scales: activations are not quantized"),
    (r".*\.self_attn\.(k_proj\.k_scale|v_proj\.v_scale)", "scales of another implementation's key-value cache"),
    (r".*\.rotary_emb\.inv_freq", "computed from the configuration"),
)
"""Tensors that a checkpoint may have and the model does not need: pattern, reason."""

SIBLINGS = ("", "_packed", "_scale", "_scale_inv", "_scale_2", "_global_scale")
"""What may follow a weight's name; where its storage is not understood, none of them is called unknown as well."""


class Survey:
    """Looks up the sources of every leaf and collects all problems instead of stopping at the first."""

    def __init__(self, tensors: dict[str, Tensor], choose: Chooser):
        self.tensors = tensors
        self.choose = choose
        self.claimed: set[str] = set()
        self.missing: dict[str, None] = {}
        self.mismatched: list[tuple[str, str]] = []
        self.refused: dict[str, None] = {}
        self.detected: dict[str, Stored | None] = {}

    def has(self, name: str) -> bool:
        """Whether the weight `name` is there at all."""
        return name in self.tensors or name + "_packed" in self.tensors

    def sources(self, leaf: Leaf) -> tuple[Stored, ...] | None:
        """How the sources of `leaf` are stored, None where they have problems."""
        found = [self._stored(name, leaf) for name in leaf.sources]
        sources = tuple(stored for stored in found if stored is not None)
        return sources if len(sources) == len(found) else None

    def _stored(self, name: str, leaf: Leaf) -> Stored | None:
        if name not in self.detected:
            self.detected[name] = self._detect(name, leaf)
        return self.detected[name]

    def _detect(self, name: str, leaf: Leaf) -> Stored | None:
        try:
            stored = detect(name, self.tensors)
        except CheckpointError as error:
            self.claimed |= {name + suffix for suffix in SIBLINGS}
            self.claimed |= {name.removesuffix(".weight") + suffix for suffix in BESIDE}
            if isinstance(error, MissingTensors):
                self.missing |= dict.fromkeys(error.names)
            else:
                self.refused[str(error)] = None
            return None
        self.claimed |= {tensor.name for tensor in stored.tensors}
        if stored.shape != leaf.source_shape:
            self.mismatched.append((name, f"found {list(stored.shape)}, config.json says {list(leaf.source_shape)}"))
            return None
        return self.choose(stored)

    def ignored(self) -> dict[str, int]:
        """How many tensors each reason of IGNORED covers; they are claimed from now on."""
        counts: collections.Counter[str] = collections.Counter()
        for name in [name for name in self.tensors if name not in self.claimed]:
            reason = next((why for pattern, why in IGNORED if re.fullmatch(pattern, name)), None)
            if reason is not None:
                self.claimed.add(name)
                counts[reason] += 1
        return dict(counts)

    def raise_problems(self, folder: str) -> None:
        """Raise CheckpointError with everything that was found, or UsageError where only the policy is to blame."""
        unknown = [name for name in self.tensors if name not in self.claimed]
        sections = []
        if self.missing:
            sections.append(f"{len(self.missing)} tensors are missing: {'; '.join(fold_names(self.missing))}")
        if self.mismatched:
            details = "; ".join(fold_details(self.mismatched))
            sections.append(f"{len(self.mismatched)} tensors have another shape: {details}")
        if self.refused:
            texts = listing(self.refused)
            sections.append(f"{len(self.refused)} weights are stored in a way that is not read: {texts}")
        if unknown:
            names = "; ".join(fold_names(unknown))
            sections.append(f"{len(unknown)} tensors are unknown, and may change the model: {names}")
        if sections:
            raise CheckpointError(f"{folder} cannot be converted; nothing was written.\n  " + "\n  ".join(sections))
        if impossible := self.choose.impossible:
            raise UsageError(
                f"{len(impossible)} weights cannot be stored as the policy says; nothing was written. "
                "Give them another format in a policy file: " + "; ".join(fold_details(impossible))
            )
