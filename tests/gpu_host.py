"""Experts in host memory on GPUs: `python -m tests.gpu_host` compares them with experts on the device."""

import jax
import jax.numpy as jnp
import numpy as np

import dsv32_jax as ds
from dsv32_jax.checkpoint.load import place_on_host
from dsv32_jax.checkpoint.random_weights import leaf_maker
from dsv32_jax.layout import leaves
from dsv32_jax.model.model import build
from tests.gpu import small_config


def make(cfg, dtype, host_layers, mesh=None):
    """A model with random weights whose first `host_layers` MoE layers have their experts in host memory."""
    on_device = leaf_maker(cfg, dtype, mesh=mesh)
    whole = leaf_maker(cfg, dtype)
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    first = tuple(f"layers.{cfg.first_k_dense_replace + i}.ffn." for i in range(host_layers))

    def leaf(path):
        if first and path.startswith(first) and table[path].stacked:
            return place_on_host(jax.tree.map(np.asarray, whole(path)), table[path], mesh)
        return on_device(path)

    return build(cfg, dtype, leaf, mesh=mesh)


def main() -> None:
    cfg = small_config(3)
    tokens = np.random.default_rng(1).integers(3, cfg.vocab_size, (2, 300), np.int32)
    for mesh in [None] if jax.device_count() == 1 else ["expert=2", "model=2", "data=2"]:
        where = None if mesh is None else ds.mesh(mesh)
        base = make(cfg, jnp.float32, 0, where)
        want, made = np.asarray(ds.forward(base, tokens).logits), None
        made = ds.generate(base, tokens[:, :40].tolist(), max_new_tokens=8).tokens
        for host in (1, 2):
            model = make(cfg, jnp.float32, host, where)
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
