"""Experts in host memory on GPUs: `python -m tests.gpu_host` compares them with experts on the device."""

import jax
import jax.numpy as jnp
import numpy as np

import dsv32_jax as ds
from dsv32_jax.bench.decode_step import make_model
from dsv32_jax.layout import leaves
from tests.gpu import small_config


def make(cfg, host_layers, mesh):
    """A float32 model with random weights whose first `host_layers` MoE layers have their experts in host memory."""
    first = tuple(f"layers.{cfg.first_k_dense_replace + i}.ffn." for i in range(host_layers))
    host = [leaf.path for leaf in leaves(cfg) if leaf.stacked and first and leaf.path.startswith(first)]
    return make_model(cfg, mesh, host, jnp.float32)


def main() -> None:
    cfg = small_config(3)
    tokens = np.random.default_rng(1).integers(3, cfg.vocab_size, (2, 300), np.int32)
    for mesh in [None] if jax.device_count() == 1 else ["expert=2", "model=2", "data=2"]:
        where = None if mesh is None else ds.mesh(mesh)
        base = make(cfg, 0, where)
        want, made = np.asarray(ds.forward(base, tokens).logits), None
        made = ds.generate(base, tokens[:, :40].tolist(), max_new_tokens=8).tokens
        for host in (1, 2):
            model = make(cfg, host, where)
            for count in (40, 300):  # few tokens go to the host, many have the experts sent
                got = np.asarray(ds.forward(model, tokens[:, :count]).logits)
                off = np.abs(got - want[:, :count]).max() / np.abs(want).max()
                print(f"mesh {mesh}, {host} host layers, {count} tokens: logits differ by {off:.1e}", flush=True)
                assert off < 1e-4
            got = ds.generate(model, tokens[:, :40].tolist(), max_new_tokens=8).tokens
            print("greedy tokens:", got == made, flush=True)
            assert got == made


if __name__ == "__main__":
    main()
