"""Is the training's forward pass the library's? Compares both on random weights in float32, dense and sparse.

PYTHONPATH=. python tests/demo_training/check.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from forward import Phase, feed_forward, model_of, run
from train import first_weights

import dsv32_jax as ds
from dsv32_jax import configs
from dsv32_jax.model.cache import empty_layer


def main() -> None:
    cfg = ds.Config.from_json(configs.path("tiny"))
    model = model_of(first_weights(cfg, jax.random.key(0)), cfg, jnp.float32)
    for length, phase in ((cfg.index_topk, Phase(True, False)), (3 * cfg.index_topk, Phase(True, True))):
        tokens_BT = jax.random.randint(jax.random.key(1), (2, length + 1), 3, cfg.vocab_size)
        ours = jax.jit(run, static_argnums=2)(model, tokens_BT, phase)
        out = ds.forward(model, np.asarray(tokens_BT[:, :-1]))
        positions = jnp.arange(length)[None] + jnp.zeros((2, 1), jnp.int32)
        draft, _ = model.mtp(out.hidden, tokens_BT[:, 1:], empty_layer(cfg, 2, length, model.dtype), positions)
        same(f"logits of {length} tokens, {phase}", ours.logits_BTV, out.logits)
        same("MTP's", ours.draft_BTV, model.mtp.logits(draft))
    h_BTD = jax.random.normal(jax.random.key(2), (2, 30, cfg.hidden_size))
    same("experts", feed_forward(model.layers[-1].ffn, h_BTD)[0], model.layers[-1].ffn(h_BTD)[0])


def same(what: str, a, b) -> None:
    difference = float(jnp.abs(a - b).max() / jnp.abs(b).max())
    print(f"{what}: largest difference {difference:.1e} of the largest value")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
