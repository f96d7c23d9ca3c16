"""Makes tests/data from the whole golden sets: `python -m tests.trim PATH`. tests/data/README.md states the rule."""

import json
import re
import shutil
import struct
import sys
from pathlib import Path

from tests.golden import header

DATA = Path(__file__).parent / "data"

CASES = (
    "golden/p2_noyarn_mtp_latesparse",
    "golden/p4_fp8_realheaddims",
    "golden/units_realdims",
    "golden_nvfp4/nvfp4_units",
    "golden_nvfp4/v2_modelopt_mlp_oproj_mtp",
    "golden_nvfp4/v3_ct_nvfp4a16",
    "golden_nvfp4/v5_fp8_source",
)

LEFT_OUT = (
    r"bf16\.logits",
    r"final_norm",
    r"hidden\.(?!1$)\d+",
    r"L\d+\.attn_out",
    r"mtp\.(block_out|eh_proj_out|prev_hidden|logits_pos0_embed_zeroed)",
    r"bf16w\.mtp\..*",
    r"fp8sim\.(?!hidden\.1$).*",
    r"nvfp4\.bf16w\..*",
    r"dequant_bf16\..*",
    r"nvfp4\.dequant\..*",
    r"(actq\.float|gemm)\..*",
    r"kv\..*_float_.*",
    r"index\.weights_folded_f32",
)
"""Tensors that repeat what others show, or belong to what is not computed here (the last three)."""


def kept(names: dict[str, int]) -> list[str]:
    """The names of a file to keep, given each one's size: of `dequant.*` only the smallest."""
    left = [name for name in names if not any(re.fullmatch(pattern, name) for pattern in LEFT_OUT)]
    matrices = sorted((name for name in left if name.startswith("dequant.")), key=lambda name: (names[name], name))
    return [name for name in left if name not in matrices[1:]]


def trim(source: Path, target: Path) -> None:
    """Copy one safetensors file without what is left out, byte by byte otherwise."""
    entries, raw = header(source), source.read_bytes()
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    found, data = {}, b""
    for name in kept(sizes):
        entry = entries[name]
        first, last = (entry["start"] + offset for offset in entry["data_offsets"])
        span = [len(data), len(data) + last - first]
        found[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": span}
        data += raw[first:last]
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main(shared: Path) -> None:
    """Write every case anew and say how large they are."""
    for case in CASES:
        target = DATA / case
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in sorted((shared / case).iterdir()):
            if file.name in ("golden.safetensors", "units.safetensors"):
                trim(file, target / file.name)
            elif file.name != "expected_nvfp4_shared.safetensors":
                shutil.copyfile(file, target / file.name)
        print(f"{sum(file.stat().st_size for file in target.iterdir()) / 1e6:7.2f} MB  {case}")
    print(f"{sum(file.stat().st_size for file in DATA.rglob('*') if file.is_file()) / 1e6:7.2f} MB  in all")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
