"""N(k) against the paper's numbers and formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from ict_fast import presets
from ict_fast.config import MethodConfig
from ict_fast.consistency.curriculum import (
    Extension,
    num_scales,
    read_extensions,
    stages,
    stages_trained,
    teacher_ema_decay,
)
from ict_fast.errors import InputError

ICT = MethodConfig()
SQUARE_ROOT = replace(ICT, curriculum="square-root", s0=2, s1=150)


def test_cifar10_stages_are_the_papers() -> None:
    plan = stages(400_000, ICT)
    assert [stage.num_scales for stage in plan] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert [stage.first_step for stage in plan] == [50_000 * i for i in range(8)]
    assert plan[-1].end_step == 400_000


def test_every_stage_border_and_the_last_step() -> None:
    for total in (8, 100, 1200, 400_000, 800_000):
        length = total // 8
        for stage in range(8):
            border = stage * length
            assert num_scales(border, total, ICT) == 10 * 2**stage + 1
            if stage:
                assert num_scales(border - 1, total, ICT) == 10 * 2 ** (stage - 1) + 1
        assert num_scales(total, total, ICT) == 1281, "the cap s1 holds at k = K"


@pytest.mark.parametrize("total", range(1, 8))
def test_runs_shorter_than_eight_steps_keep_the_first_stages(total: int) -> None:
    assert [num_scales(k, total, ICT) for k in range(total)] == [10 * 2**k + 1 for k in range(total)]


def test_steps_after_the_last_whole_stage_stay_at_the_cap() -> None:
    # K = 1203: K' = 150, and steps 1200..1202 lie past the eighth stage.
    assert {num_scales(k, 1203, ICT) for k in range(1050, 1204)} == {1281}


def test_a_ratio_that_is_no_power_of_two_still_ends_at_the_cap() -> None:
    for s1 in (100, 105):  # floor(s1 / s0) is 10 of both
        method = replace(ICT, s0=10, s1=s1)
        length = math.floor(1000 / (math.log2(10) + 1))
        expected = [min(10 * 2 ** (k // length), s1) + 1 for k in range(1001)]
        assert [num_scales(k, 1000, method) for k in range(1001)] == expected
        assert expected[-1] == s1 + 1


def test_square_root_curriculum_equals_its_formula() -> None:
    total = 7919
    for k in range(0, total + 1, 13):
        value = math.sqrt(k / total * (151**2 - 2**2) + 2**2)
        if abs(value - round(value)) > 1e-9:
            assert num_scales(k, total, SQUARE_ROOT) == math.ceil(value - 1) + 1
    assert num_scales(0, total, SQUARE_ROOT) == 2
    assert num_scales(total, total, SQUARE_ROOT) == 151


def test_fixed_curriculum_never_changes() -> None:
    assert [s.num_scales for s in stages(100, replace(ICT, curriculum="fixed", s0=1280))] == [1281]


@pytest.mark.parametrize("method", [ICT, SQUARE_ROOT, replace(ICT, curriculum="fixed")])
@pytest.mark.parametrize("total", [1, 5, 8, 24, 1203])
def test_stages_cover_every_step_once(method: MethodConfig, total: int) -> None:
    covered = [(k, s.num_scales) for s in stages(total, method) for k in range(s.first_step, s.end_step)]
    assert covered == [(k, num_scales(k, total, method)) for k in range(total)]


@pytest.mark.parametrize(("divisor", "first", "last"), [("points", 2, 151), ("pairs", 1, 150)])
def test_ema_teacher_decay_is_the_2023_formula(
    divisor: Literal["points", "pairs"], first: int, last: int
) -> None:
    """Of the paper, over N, and of its authors' code, over N before it is raised by one."""
    method = replace(presets.get("cifar10-ct2023").method, teacher_ema_divisor=divisor)
    assert teacher_ema_decay(2, method) == pytest.approx(0.9 ** (2 / first))
    assert teacher_ema_decay(151, method) == pytest.approx(0.9 ** (2 / last))


def test_the_stages_of_an_extended_run_are_those_of_the_plan_of_each_time() -> None:
    """24 steps of 24, extended to 32, stopped at 28, extended to 64: as N(k) says step by step."""
    totals = [24] * 24 + [32] * 4 + [64] * 36
    expected = [num_scales(k, total, ICT) for k, total in enumerate(totals)]
    plan = stages_trained(64, ICT, [Extension(24, 24), Extension(28, 32)])
    assert [stage.num_scales for stage in plan for _ in range(stage.first_step, stage.end_step)] == expected
    assert all(one.num_scales != other.num_scales for one, other in itertools.pairwise(plan))
    assert stages_trained(64, ICT, []) == stages(64, ICT)


def test_a_plan_that_changed_since_the_checkpoint_is_an_extension() -> None:
    state = {"step": 24, "extended": [[8, 8]], "config": {"training": {"total_steps": 24}}}
    assert read_extensions(state, Path("state.json"), 24) == [(8, 8)]
    assert read_extensions(state, Path("state.json"), 32) == [(8, 8), (24, 24)]


@pytest.mark.parametrize(
    "altered",
    ["x", 3, None, [3], [[1]], [[1, 2, 3]], [[0, 8]], [[9, 8]], [[8, 8], [4, 8]], [[1.0, 8]]],
)
def test_an_altered_record_of_extensions_is_refused(altered: object) -> None:
    with pytest.raises(InputError, match=r"state\.json: its record of --extend is altered"):
        read_extensions({"extended": altered}, Path("state.json"), 8)
