"""Some seconds of tests.fuzz; more with --fuzz SECONDS, always from another seed."""

import time

import pytest

from tests import fuzz


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return fuzz.World.make(tmp_path_factory.mktemp("fuzz"))


def test_damaged_input_is_read_as_before_or_refused(world, request):
    """Every kind of file and message, by chance."""
    seconds = request.config.getoption("--fuzz")
    done, findings = fuzz.fuzz(world, list(fuzz.CASES), int(time.time()) if seconds > 10 else 0, 10**9, seconds)
    assert not findings and done


@pytest.mark.parametrize("error", [KeyError("x"), fuzz.Hang(), RecursionError()], ids=repr)
def test_what_is_a_finding(world, monkeypatch, error):
    """Any error but those that are raised on purpose."""

    def fail(*_):
        raise error

    monkeypatch.setitem(fuzz.CASES, "header", fail)
    done, findings = fuzz.fuzz(world, ["header"], 3, 1)
    assert done == 1 and findings[0].startswith("header 3: ")
