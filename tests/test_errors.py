"""Messages speak the caller's language."""

import contextvars

import pytest

from dsv32_jax import errors


@pytest.mark.parametrize(
    ("given", "python", "command_line"),
    [
        (("max_new_tokens", 5), "max_new_tokens=5", "--max-new-tokens 5"),
        (("cache_dtype", "fp8"), 'cache_dtype="fp8"', "--cache-dtype fp8"),
        (("draft", 0), "draft=0", "--draft 0"),
        (("top_p", 0.5), "top_p=0.5", "--top-p 0.5"),
        (("layerwise", True), "layerwise=True", "--layerwise"),
        (("capacity",), "capacity", "--capacity"),
    ],
    ids=str,
)
def test_an_argument_is_spelled_as_the_caller_types_it(given, python, command_line):
    """In Python by default; as an option where the command line said so, and not beyond."""

    def on_command_line() -> str:
        errors.COMMAND_LINE.set(True)
        return errors.argument(*given)

    assert errors.argument(*given) == python
    assert contextvars.copy_context().run(on_command_line) == command_line
    assert errors.argument(*given) == python
