"""The choice of implementation says honestly what this version has."""

import pytest

import ict_kernels


def test_auto_and_eager_are_accepted():
    assert ict_kernels.get_backend() == "auto"
    ict_kernels.set_backend("eager")
    assert ict_kernels.get_backend() == "eager"
    ict_kernels.set_backend("auto")


@pytest.mark.parametrize("name", ["triton", "apex"])
def test_a_backend_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(RuntimeError, match=name):
        ict_kernels.set_backend(name)
    assert ict_kernels.get_backend() == "auto"


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="auto, triton, eager, apex"):
        ict_kernels.set_backend("cuda")
