"""Following one request takes few files. A conversion should take 20."""

import pytest

from tests import entered

MOST = {"generate": 18, "load": 8, "convert": 27}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that each request enters."""
    return entered.measure(tmp_path_factory.mktemp("entered"))


@pytest.mark.parametrize("request_name", MOST)
def test_a_request_enters_few_files(files, request_name):
    found = files[request_name] if request_name == "convert" else entered.outside_of_the_model(files[request_name])
    assert len(found) <= MOST[request_name], found
