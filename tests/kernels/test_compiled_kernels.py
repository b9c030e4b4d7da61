"""The machine code of the kernels, compiled ahead of time for sm_80, sm_90 and sm_100; no GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import compiled_kernels
from kernel_cases import Case, cases

# fp64 is for the few scalars of a step, never for elements.
FP64_ALLOWED = {"RAdamEMA scalars"}


def check(case: Case, architectures: tuple[int, ...], scalars: tuple[str, ...]) -> None:
    for record in compiled_kernels.measure(case, architectures, scalars):
        name = (
            f"{case.op}, {case.shape}, {record['kernel']}, sm_{record['architecture']}, {record['scalars']}"
        )
        assert record["stack_bytes"] == 0, f"{name} spills"
        assert record["fp64"] == 0 or record["elements"] == 0, f"{name} computes in fp64"


@pytest.mark.parametrize("case", cases(full=False), ids=lambda case: f"{case.op}, {case.shape}")
def test_a_kernel_does_not_spill_compute_in_fp64_or_load_narrowly(case: Case) -> None:
    check(case, compiled_kernels.ARCHITECTURES, ("fp32",))
