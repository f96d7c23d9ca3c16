"""Mistakes in what edits, contrasts and patches promise, each with the test that sees it.

`python -m tests.edit_mistakes` plants them, as `python -m tests.mutations` does those of the model.
"""

import sys

from tests.mutations import MOE, main, mistake

MODULES, EDIT, PATCH, CONTRAST = (
    f"dsv32_jax/inspect/{name}.py" for name in ("edited_modules", "interventions", "patching", "contrasts")
)
PAGES, SESSION = "dsv32_jax/generation/pages.py", "dsv32_jax/generation/session_file.py"

EDITS, PAIRS = "tests/test_edit.py::test_", "tests/test_contrast.py::test_"

NOTHING = EDITS + "editing_nothing_changes_nothing"
IDENTITY = EDITS + "every_edit_has_an_identity"
DIRECTION = EDITS + "a_direction_is_added"
EVERYWHERE = EDITS + "edits_work_on_a_mesh_and_from_host_memory"
OFF = EDITS + "an_expert_that_is_off_is_never_selected"
REPLACE = "model = _replace_layer(model, layer, dataclasses.replace(block, ffn=ffn))"
ZERO = "Shift(place_whole(model, np.zeros(model.cfg.hidden_size, np.float32)), place_whole(model, np.int32(0)))"
ADD = "y_BTD + jnp.where((position_BT >= self.start)[..., None], self.direction_D, 0)"
ONE_TREE = (
    "self._root = Node([], -1, None)\n        self._nodes: dict[Node, None] = {}",
    "self._root, self._nodes = Pages.shared = getattr(Pages, 'shared', (Node([], -1, None), {}))",
)

MISTAKES = (
    mistake("nothing_is_an_edit", NOTHING, EDIT, "if edited is model:", "if edited is None:"),
    mistake(
        "a_bias_is_another_program", NOTHING, EDIT,
        REPLACE, f"{REPLACE}\n        model = change_stream(model, layer, ({ZERO},))",
    ),
    mistake("off_is_unlikely", OFF, EDIT, "[*((*pair, -np.inf) for", "[*((*pair, -0.5) for"),
    mistake("gates_keep_the_share_of_others", OFF, MOE, "(jnp.sum(chosen_BTX, axis=-1, keepdims=True) + 1e-20)", "2.0"),
    mistake("favour_is_ignored", EDITS + "a_favoured_expert_is_selected", EDIT, "((*pair, x) for", "((*pair, 0) for"),
    mistake("a_zero_direction_rounds", DIRECTION, MODULES, ADD, f"({ADD}).astype(jnp.bfloat16).astype(jnp.float32)"),
    mistake("start_is_one_late", DIRECTION, MODULES, "position_BT >= self.start", "position_BT > self.start"),
    mistake("scale_is_ignored", DIRECTION, EDIT, " * np.float32(scale)", ""),
    mistake(
        "a_direction_is_a_matrix", EDITS + "an_edit_costs_at_most_a_hundredth_of_a_step", MODULES,
        ADD, f"{ADD} + 0 * (y_BTD @ (self.direction_D[:, None] * self.direction_D))",
    ),
    mistake("skip_does_nothing", EDITS + "a_skipped_layer_is_absent", MODULES, "return x_BTD\n", "return y_BTD\n"),
    mistake(
        "another_head_is_silent", EDITS + "silent_heads_are_zero_columns", EDIT,
        "kept_H[[head for i,", "kept_H[[head - 1 for i,",
    ),
    mistake(
        "window_is_one_wider", EDITS + "a_restricted_indexer_selects_within_its_window", MODULES,
        "slot_S > position_BT", "slot_S >= position_BT",
    ),
    mistake("dense_is_almost_dense", EDITS + "dense_by_edit", EDIT, "index_topk=topk)", "index_topk=min(topk, 40))"),
    mistake(
        "one_token_is_not_edited", EDITS + "edits_work_with_drafts_and_layerwise", MODULES,
        "for change in self.changes:", "for change in self.changes if x_BTD.shape[1] > 1 else ():",
    ),
    mistake(
        "lost_on_a_mesh", EVERYWHERE, EDIT,
        "jax.device_put(value, sharding)",
        "jax.device_put(value if model.mesh is None else np.zeros_like(value), sharding)",
    ),
    mistake(
        "lost_with_experts_in_host_memory", EVERYWHERE, EDIT,
        "bias_E[expert] += np.asarray(bias, bias_E.dtype)",
        'bias_E[expert] += 0 if type(block.ffn.w_up_EMD).__name__ == "HostWeight" else bias',
    ),
    mistake("pages_of_all_engines", EDITS + "pages_of_one_edit_are_never_used_for_another", PAGES, *ONE_TREE),
    mistake("identity_without_edit", IDENTITY, SESSION, "if model.origin.edit else", "if not digest else"),
    mistake(
        "identity_without_direction", IDENTITY, EDIT,
        'f"{i} ".encode() + np.asarray(add[i], np.float32).tobytes()', 'f"{i} ".encode()',
    ),
    mistake("identity_without_edits_before", IDENTITY, EDIT, 'f"{model.origin.edit} {facts}"', 'f"{facts}"'),
    mistake(
        "patch_one_position_early", PAIRS + "a_patch_is_local", MODULES,
        "self.stream_sD.at[position_BT]", "self.stream_sD.at[jnp.maximum(position_BT - 1, 0)]",
    ),
    mistake(
        "patch_all_layers_but_one", PAIRS + "a_patch_is_local", PATCH, "places[i == layer]", "places[i != layer]",
    ),
    mistake(
        "patch_keeps_the_corrupted_run", PAIRS + "a_patch_of_everything_equals_the_clean_run", MODULES,
        "jnp.where(at_BT[..., None], other_BTD, y_BTD)", "jnp.where(at_BT[..., None], (other_BTD + y_BTD) / 2, y_BTD)",
    ),
    mistake(
        "patch_forgets_the_edit", PAIRS + "a_patch_of_an_edited_model", PATCH,
        "(*get_changes(model, i), Patch(other, places[i == layer]))", "(Patch(other, places[i == layer]),)",
    ),
    mistake(
        "padding_is_counted", PAIRS + "experts_are_counted", CONTRAST,
        "real_BT[..., None].astype(jnp.int32)", "jnp.ones_like(real_BT[..., None], jnp.int32)",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(MISTAKES))
