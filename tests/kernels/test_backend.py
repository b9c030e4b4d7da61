"""The choice of implementation says honestly what this version has."""

import pytest
import torch

import ict_kernels
from ict_kernels.backend import use_triton


def test_auto_and_eager_are_accepted():
    assert ict_kernels.get_backend() == "auto"
    ict_kernels.set_backend("eager")
    assert ict_kernels.get_backend() == "eager"
    ict_kernels.set_backend("auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_kernels_that_cannot_run_are_refused():
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|Triton cannot be imported"):
        ict_kernels.set_backend("triton")
    assert ict_kernels.get_backend() == "auto"


def test_without_the_interpreter_a_cpu_tensor_goes_to_the_definition():
    assert not use_triton(torch.zeros(1), None)


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="auto, triton, eager, apex"):
        ict_kernels.set_backend("cuda")
