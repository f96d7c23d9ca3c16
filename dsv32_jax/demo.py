"""`dsv32 demo`: the whole way from a Hugging Face folder to tokens, on a small model with random weights."""

import tempfile
import time
from pathlib import Path

from . import random_checkpoint
from .config import Config

PROMPTS = [[0, 17, 42, 7, 99, 5, 23], [0, 250, 8]]


def run(new_tokens: int) -> None:
    """Write, convert, load and run the preset `tiny`; print what happened and how long it took."""
    from dsv32_jax import configs, convert

    cfg = Config.from_json(configs.path("tiny"))
    with tempfile.TemporaryDirectory(prefix="dsv32-demo-") as scratch:
        source, target = Path(scratch, "hf"), Path(scratch, "converted")
        with _timed("wrote a random NVFP4 checkpoint in Hugging Face layout") as done:
            random_checkpoint.write(source, cfg)
            size = sum(file.stat().st_size for file in source.iterdir())
            done(f"{cfg.num_hidden_layers} layers + MTP, {size / 1e6:.1f} MB")
        with _timed("converted it to an Orbax checkpoint") as done:
            manifest = convert.convert(source, target)
            done(f"{len(manifest.leaves)} leaves")
        with _timed("imported JAX and loaded the model") as done:
            from .checkpoint import load
            from .generation import generate

            model = load(target)
            done(f"compute in {model.dtype}")
        with _timed(f"generated for {len(PROMPTS)} ragged prompts") as done:
            generation = generate(model, PROMPTS, max_new_tokens=new_tokens)
            stats = generation.stats
            done(f"{stats.compile_seconds:.1f} s of it compiling {stats.compiles} programs, kept for the next run")
    for prompt, tokens, reason in zip(PROMPTS, generation.tokens, generation.finish_reason, strict=True):
        print(f"  {prompt} -> {tokens} ({reason})")
    print(
        f"prefill {stats.prefill_tokens_per_second:.0f} tokens/s, decode {stats.decode_tokens_per_second:.0f} tokens/s"
    )
    print("The weights are random, so the tokens mean nothing; the path is that of the real model.")


class _timed:
    """Prints one line for what ran inside the `with`: its seconds, what it was, and what `done` was told."""

    def __init__(self, what: str):
        self.what, self.note = what, ""

    def __enter__(self):
        self.start = time.perf_counter()
        return lambda note: setattr(self, "note", note)

    def __exit__(self, kind, *_):
        if kind is None:
            print(f"{time.perf_counter() - self.start:6.1f} s  {self.what}: {self.note}", flush=True)
