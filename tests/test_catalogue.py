"""The catalogue of what goes wrong in generation, and the test of each: G32 and G33 concern a server, which is none."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CATALOGUE = {
    "G01 prompt and new tokens exceed the cache": "generation/test_generate.py::test_g01_a_request_that_does_not_fit",
    "G02 text to a chat model": "cli/test_generate.py::test_g02_text_is_continued_and_chat_is_asked_for",
    "G03 the first call hangs, compiling": "generation/test_generate.py::test_g03_a_long_compilation_says_so",
    "G04 every length compiles": "generation/test_generate.py::test_fifty_lengths_share_three_buckets",
    "G05 the device has no memory left": "generation/test_generate.py::test_g05_a_device_without_memory",
    "G06 temperature 0": "generation/test_sampling.py::test_temperature_zero_is_greedy_without_division",
    "G07 temperatures that are none": "generation/test_generate.py::test_g07_wrong_temperatures",
    "G08 ragged batch": "generation/test_generate.py::test_a_row_is_the_row_alone",
    "G09 a seed means something else in another batch": "generation/test_generate.py::test_seeds",
    "G10 token ids that are none": "generation/test_generate.py::test_g10_wrong_token_ids",
    "G11 stop strings over tokens, half characters": "chat/test_tokenizer.py::test_g11_no_broken_character",
    "G12 no end token comes": "generation/test_generate.py::test_g12_an_end_token_that_never_comes",
    "G13 a session runs past its cache": "test_model.py::test_a_full_cache_is_refused_and_stays_as_it_is",
    "G14 0, negative, no, a billion new tokens": "generation/test_generate.py::test_g14_wrong_numbers_of_new_tokens",
    "G15 neutral and wrong truncation": "generation/test_generate.py::test_g15_neutral_values",
    "G16 empty prompts": "generation/test_generate.py::test_g16_empty_and_missing_prompts",
    "G17 Ctrl-C": "generation/test_generate.py::test_ctrl_c_returns_what_is_there",
    "G18 logits that are no numbers": "generation/test_generate.py::test_g18_one_row_at_a_later_step",
    "G19 rows that the mesh does not divide": "test_meshes.py::test_g19_rows_that_do_not_divide",
    "G20 meshes that are none": "test_meshes.py::test_g20_wrong_meshes",
    "G21 a cache that was given away": "generation/test_sessions.py::test_a_stream_that_is_left",
    "G22 lengths around index_topk": "generation/test_generate.py::test_every_edge_is_the_oracle",
    "G23 a setting that compiles": "generation/test_generate.py::test_changing_a_sampling_parameter_compiles_nothing",
    "G24 another model's tokenizer": "chat/test_tokenizer.py::test_g24_what_is_not_the_models_tokenizer",
    "G25 ids outside the vocabulary": "chat/test_tokenizer.py::test_g25_ids_outside_the_vocabulary",
    "G26 content that forges special tokens": "chat/test_tokenizer.py::test_g26_content_forges_no_special_token",
    "G27 malformed messages": "chat/test_encoding.py::test_g27_malformed_messages",
    "G28 two threads, one model": "generation/test_generate.py::test_g28_many_threads",
    "G29 too many log-probabilities": "generation/test_generate.py::test_wrong_options",
    "G30 a session of another model": "generation/test_sessions.py::test_a_session_of_another_model",
    "G31 memory that another process holds": "cli/test_doctor.py::test_gpus_without_a_plugin",
    "G34 a very long prompt": "generation/test_generate.py::test_chunks_are_the_whole",
    "G35 stop strings that are none": "generation/test_generate.py::test_g35_wrong_stop_strings",
}


@pytest.mark.parametrize("fault", CATALOGUE)
def test_every_fault_has_its_test(fault):
    file, _, name = CATALOGUE[fault].partition("::")
    assert f"\ndef {name}(" in (TESTS / file).read_text()
