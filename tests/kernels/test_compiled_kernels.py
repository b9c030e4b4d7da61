"""The machine code of the kernels, compiled ahead of time; no GPU is needed."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import compiled_kernels
from kernel_cases import Case, cases

# Kernels of a few values per sample or channel, which have no bulk to read in wide loads.
SMALL = {
    "_scalars_kernel",
    "_levels_kernel",
    "_reduce_kernel",
    "merge_statistics",
    "merge_backward",
    "sum_samples",
}
# Images arrive as bytes, mirrored by gathers: only what the noising writes is wide.
WIDE_STORES_ONLY = {"_noise_kernel"}

# Instructions per element, by what comes with the norm. Forward it is what a memory-bound kernel can afford
# at 4 bytes per element, and 36 with dropout. Backward it is what is reached now, and must not grow: the 132
# processors of an H100 or H200 issue about 29e12 instructions of threads a second, which at 6 bytes per
# element allow 58 on an H100 (3.0 TB/s) and 40 on an H200 (4.3), if they overlapped with the reading. Beyond
# an H200's budget are, on sm_90, 768 (53.5 at 8 x 8), 384 (53.0) and 576 (48.6) channels with dropout, with
# scale and shift (47.3, 46.6, 40.5), and 256 with dropout (41.6 at 8 x 8); 256 alone takes 26.1 at 16 x 16.
MOST_INSTRUCTIONS = {
    "resident_forward": {"": 27, "scale_shift": 27, "dropout": 36},
    "resident_backward": {"": 41, "scale_shift": 48, "dropout": 54},
}

# The images and samples of these have 105 elements, so that no two of them begin at 16 bytes; nor do the
# pixels of 33 channels.
UNALIGNED_SHAPES = ("6 x 105,", "6 x 5 x 7 x 3,", "33 x 65 x 65,")


RESULTS = Path(__file__).parents[2] / "benchmarks/results"
COMMITTED = json.loads((RESULTS / "compiled-kernels-few.json").read_text())
# What identifies a launch; all the rest is compared.
KEY = ("op", "shape", "kernel", "architecture", "scalars")


def committed_like(record: dict[str, Any]) -> dict[str, Any]:
    """The committed record of the same launch; of several of one kernel the one that agrees, if any does."""
    found = [each for each in COMMITTED["kernels"] if all(each[name] == record[name] for name in KEY)]
    assert found, f"{[record[name] for name in KEY]} is not in compiled-kernels-few.json; run `make counts`"
    return record if record in found else found[0]


def check(record: dict[str, Any]) -> None:
    assert record["stack_bytes"] == 0, "spills"
    # The scalars of an optimizer step are fp64; elements never are.
    assert record["fp64"] == 0 or record["kernel"] == "_scalars_kernel"
    assert record["fused_sums"] == 0, "compute-sanitizer's racecheck finds lanes that store unequal sums"
    if record["kernel"] not in SMALL and not record["shape"].startswith(UNALIGNED_SHAPES):
        assert 128 in record["stores"] or not record["stores"] or record["kernel"] in NO_WIDE_STORES
        assert 128 in record["loads"] or record["kernel"] in WIDE_STORES_ONLY
    if record["kernel"] in MOST_INSTRUCTIONS:
        option = next((each for each in ("dropout", "scale_shift") if each in record["shape"]), "")
        assert record["instructions_per_element"] <= MOST_INSTRUCTIONS[record["kernel"]][option]


# Sums: one value per program or channel.
NO_WIDE_STORES = {"_forward_kernel", "_norm_kernel", "split_statistics", "split_backward"}


@pytest.mark.parametrize("architecture", compiled_kernels.ARCHITECTURES)
@pytest.mark.parametrize("case", list(cases(full=False)), ids=lambda case: f"{case.op}, {case.shape}")
def test_a_kernel_neither_spills_nor_computes_in_fp64_nor_loads_narrowly(
    case: Case, architecture: int
) -> None:
    scalars = ("fp32", "fp64") if architecture == 90 else ("fp32",)
    for record in compiled_kernels.measure(case, [architecture], scalars):
        check(record)
        if metadata.version("triton") == COMMITTED["versions"]["triton"]:
            stored = json.loads(json.dumps(record))  # its keys are text
            assert stored == committed_like(stored), "if this is meant, `make counts` writes the table anew"


def test_the_committed_few_are_those_that_are_compiled_here() -> None:
    compiled = {(case.op, case.shape) for case in cases(full=False)}
    assert {(each["op"], each["shape"]) for each in COMMITTED["kernels"]} == compiled


@pytest.mark.drill
@pytest.mark.parametrize("architecture", compiled_kernels.ARCHITECTURES)
def test_every_kernel_at_every_shape(architecture: int) -> None:
    for case in cases(full=True):
        for record in compiled_kernels.measure(case, [architecture], ("fp32", "fp64")):
            check(record)


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (("FMUL R4, R1, R2", "SHFL.BFLY PT, R5, R4, 0x10, 0x1f", "FFMA R6, R2.reuse, R1, R5"), 1),
        (("FMUL R4, R1, R2", "SHFL.BFLY PT, R4, R4, 0x10, 0x1f", "@P0 FFMA R6, R1, R2, R4"), 1),
        # Rounded first; another product; the shuffled value overwritten; no other lane's.
        (("FFMA R4, R1, R2, RZ", "SHFL.BFLY PT, R5, R4, 0x10, 0x1f", "FADD R6, R4, R5"), 0),
        (("FMUL R4, R1, R2", "SHFL.BFLY PT, R5, R4, 0x10, 0x1f", "FFMA R6, R1, R3, R5"), 0),
        (("FMUL R4, R1, R2", "SHFL.BFLY PT, R5, R4, 0x1, 0x1f", "MOV R5, R7", "FFMA R6, R1, R2, R5"), 0),
        (("FMUL R4, R1, R2", "SHFL.IDX PT, R5, R4, R8, 0x1f", "FFMA R6, R1, R2, R5"), 0),
    ],
)
def test_a_product_fused_with_another_lanes_is_found(lines: tuple[str, ...], count: int) -> None:
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert compiled_kernels.fused_sums(sass) == count
