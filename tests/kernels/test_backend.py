"""The choice of implementation says honestly what this version has."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


def test_tensors_of_several_gpus_are_refused_whose_addresses_mean_nothing_to_each_other(monkeypatch):
    monkeypatch.setattr("ict_kernels.backend.runs_on", lambda device: device.type == "cuda")
    with FakeTensorMode():
        here, there = (torch.empty(2, 3, device=f"cuda:{index}") for index in range(2))
        assert use_triton(here, here, None)
        with pytest.raises(RuntimeError, match="on one device, not on cuda:0, cuda:1"):
            use_triton(here, None, there)
        with pytest.raises(RuntimeError, match="on one device"):
            ict_kernels.pseudo_huber_loss(here, there)


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="auto, triton, eager, apex"):
        ict_kernels.set_backend("cuda")
