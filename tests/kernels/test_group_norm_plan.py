"""The algorithm and the tile of group_norm_silu's kernels, at every shape of the networks and at others."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ict_kernels.group_norm_plan import chunk_bytes_of, parts, plan_of, planned

# What is split at each resolution, and backward all at 32 x 32 that has no dropout; everything else of the
# networks is resident, and backward 576 channels at 16 x 16 if they have dropout.
SPLIT = {64: {192, 384, 576}, 32: {192, 384, 576, 768, 960}, 16: {576, 960, 1152, 1344}, 8: set()}


@pytest.fixture(scope="module")
def norms_of_networks():
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    cases = importlib.import_module("kernel_cases.group_norm_silu")
    return cases, sorted(cases.norms_of("cifar10") | cases.norms_of("imagenet64"))


@pytest.mark.parametrize("backward", [False, True])
def test_every_norm_of_the_networks_has_the_algorithm_of_the_table(norms_of_networks, backward):
    cases, norms = norms_of_networks
    assert len({(norm.size, norm.channels) for norm in norms}) == 25
    for norm in norms:
        plan = cases.plan_of(norm, backward)
        expected = norm.channels in SPLIT[norm.size] and not (backward and norm.size == 16 and norm.dropout)
        if backward and norm.size == 32 and not norm.dropout:
            expected = True
        assert plan.resident != expected, norm


@pytest.mark.parametrize("backward", [False, True])
def test_every_tile_fits_and_holds_whole_groups(norms_of_networks, backward):
    cases, norms = norms_of_networks
    for norm in norms:
        plan = cases.plan_of(norm, backward)
        itemsize, group = 4 if norm.fp32 else 2, norm.channels // norm.num_groups
        assert plan.rows * sum(plan.widths) * itemsize <= 65536, norm
        if plan.resident:
            width = plan.groups * group
            assert norm.num_groups % plan.groups == 0
            assert width * itemsize >= 32, norm
            assert width % 8 == 0, norm  # 128-bit accesses, and one Philox call for eight channels
            assert width <= sum(plan.widths) < 1.15 * width, norm
            large = plan.rows * sum(plan.widths) > 96 * 32 * plan.num_warps
            drops = norm.dropout and norm.size >= 16
            cut = itemsize == 2 and not backward and (large or drops)
            assert (max(plan.slices) > 1) == cut, norm
            assert large <= cut, f"{norm}: more fp32 than registers hold"
            assert plan.maxnreg == (128 if large else None), f"{norm}: two programs on a processor"
            for columns, slices in zip(plan.widths, plan.slices, strict=True):  # 128 bits of each thread
                assert slices == 1 or plan.rows * columns == slices * 256 * plan.num_warps, norm
        else:
            assert plan.slices == (1, 1), norm
            assert norm.channels % sum(plan.widths) == 0, norm
            shape = (norm.channels, norm.size**2, norm.num_groups, itemsize, backward, norm.dropout)
            assert plan.chunk == 64
            chunk = plan_of(64, *shape, 20 * 2**20).chunk
            sample = norm.channels * norm.size**2 * itemsize * (1 + backward)
            assert chunk * sample <= 20 * 2**20 < (chunk + 1) * sample or chunk == 64, norm


@pytest.mark.parametrize(
    ("gpu", "major", "megabytes", "chunked"),
    [
        ("V100", 7, 6, False),
        ("A100", 8, 40, True),
        ("A10", 8, 6, False),
        ("RTX 4090", 8, 72, True),
        ("H100", 9, 50, False),
        ("B200", 10, 126, False),
        ("RTX 5090", 12, 96, True),
    ],
)
def test_samples_are_taken_in_chunks_where_l2_holds_them_and_memory_is_slow(
    monkeypatch, gpu, major, megabytes, chunked
):
    properties = SimpleNamespace(major=major, L2_cache_size=megabytes * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    bytes_at_once = chunk_bytes_of.__wrapped__(torch.device("cuda", 0))
    assert (bytes_at_once == 20 * 2**20) == chunked, gpu
    assert chunked or bytes_at_once > 2**60
    assert chunk_bytes_of(torch.device("cpu")) > 2**60


@pytest.mark.parametrize("backward", [False, True])
def test_samples_that_l2_does_not_hold_one_of_are_taken_all_at_once(backward):
    """A chunk of one would be read from memory twice as well, and launch for each sample."""
    megabytes = 2 * 256 * (1 + backward) / 1024  # of a row of 1,024 pixels: 256 channels, 16 bits, x and dy

    def chunk(rows):
        return plan_of(8, 256, 1024 * rows, 32, 2, backward, chunk_bytes=20 * 2**20).chunk

    most = int(20 / megabytes)
    assert [chunk(most), chunk(most + 1), chunk(10 * most)] == [1, 8, 8]
    assert chunk(most // 3) == 3
    with planned(chunk_bytes=2**20):  # a wish is heard, as far as it goes
        assert chunk(most + 1) == 1


def test_rows_that_end_within_a_sector_are_split_only_where_no_tile_is_without_them():
    """Forward at 16 x 16 in 16 bits. 1152 channels in 32 groups: 72 bytes a group, 288 of four do not fit."""
    assert not plan_of(8, 1152, 256, 32, 2, False).resident
    for channels, groups, at_once in ((640, 32, 4), (1280, 32, 2), (24, 8, 8), (40, 8, 8)):
        plan = plan_of(8, channels, 256, groups, 2, False)
        assert (plan.resident, plan.groups) == (True, at_once), channels


@pytest.mark.parametrize("backward", [False, True])
def test_a_row_of_a_tile_is_of_up_to_128_bytes_where_several_tiles_fit_on_a_processor(backward):
    """256 channels in 32 groups, of which one has rows of 16 bytes."""
    for pixels, itemsize, groups in ((64, 2, 8), (64, 4, 4), (256, 2, 4)):  # of the last 8 do not fit
        assert plan_of(8, 256, pixels, 32, itemsize, backward).groups == groups


def test_with_dropout_a_tile_with_rows_beyond_the_image_has_fewer_elements_per_thread():
    """As many as elsewhere spilled."""
    for size, dropout, warps in ((32, True, 8), (31, True, 16), (31, False, 8)):
        plan = plan_of(1, 32, size**2, 4, 2, False, dropout)
        assert (plan.resident, plan.rows, plan.num_warps) == (True, 1024, warps)


def test_more_warps_than_sums_are_safe_for_are_refused():
    """`FEW` elements are 8 for each thread of 16 warps: beyond, lanes would store sums that differ."""
    few = importlib.import_module("ict_kernels.group_norm_shared").FEW
    most = getattr(few, "value", few) // (8 * 32)
    with planned(num_warps=most):
        assert plan_of(8, 256, 1024, 32, 2, False).num_warps == most == 16
    with pytest.raises(ValueError, match="num_warps must be at most 16, got 32"), planned(num_warps=2 * most):
        pass


def test_the_plan_has_a_tile_for_any_shape():
    for count, channels, pixels, groups in (
        (1, 1, 1, 1),
        (1, 1, 10**7, 1),
        (3, 7, 35, 7),
        (1, 40_000, 1, 1),
        (2, 30, 1_000_003, 5),
        (10**6, 2, 1, 2),
        (10**6, 192, 4096, 32),
    ):
        for itemsize in (2, 4):
            for backward in (False, True):
                chosen = plan_of(count, channels, pixels, groups, itemsize, backward)
                assert 1 <= chosen.chunk <= count
                assert chosen.resident or chosen.chunk <= 65535, "the second axis of CUDA's grids"
                assert chosen.rows * sum(chosen.widths) * itemsize <= 65536
                if chosen.resident:
                    assert chosen.rows >= pixels
                    assert sum(chosen.widths) >= chosen.groups * (channels // groups)


def test_channels_are_held_in_the_fewest_parts_that_waste_the_least():
    assert [parts(width) for width in (1, 2, 3, 15, 16, 17, 72, 96, 120)] == [
        *((1, 0), (2, 0), (2, 1), (16, 0), (16, 0), (16, 1), (64, 8), (64, 32), (128, 0))
    ]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    [(33, 11, 65), (100, 25, 32), (100, 25, 8), (36, 9, 8), (90, 9, 8), (7, 7, 32), (1, 1, 256)],
)
def test_a_thread_that_draws_for_each_element_has_a_quarter_of_them(channels, groups, size, backward):
    """Where 8 does not divide the channels; with more the kernels spilled (see test_compiled_kernels.py)."""
    plan = plan_of(64, channels, size**2, groups, 2, backward, dropout=True)
    assert plan.rows * sum(plan.widths) <= (18 if backward else 24) * 32 * plan.num_warps
    assert plan.num_warps <= 16


def test_a_plan_can_be_overridden(norms_of_networks):
    cases, _ = norms_of_networks
    small, large = cases.Norm(16, 576, 32), cases.Norm(64, 192, 32)
    before = [cases.plan_of(norm, backward) for norm in (small, large) for backward in (False, True)]
    for backward in (False, True):
        with planned(resident=False, rows=32, num_warps=8, maxnreg=96, chunk_bytes=2**21):
            plan = cases.plan_of(small, backward)
            assert (plan.resident, plan.rows, plan.num_warps, plan.maxnreg) == (False, 32, 8, 96)
            assert plan.chunk == 2**21 // (576 * 16 * 16 * 2 * (1 + backward))
            launches = cases.case_of(small, backward).launches
        # The kernels that merge partial sums keep what they have.
        merging = {"merge_statistics", "merge_backward", "sum_samples"}
        tuned = [each for each in launches if each.kernel.__name__ not in merging]
        assert len(tuned) == 2
        assert {(each.num_warps, each.maxnreg, each.arguments["ROWS"]) for each in tuned} == {(8, 96, 32)}
        assert 96 not in {each.maxnreg for each in launches if each not in tuned}
        with planned(groups=16):  # by itself it would be split
            assert cases.plan_of(small, backward).groups == 16
            assert cases.case_of(small, backward).launches[0].arguments["BUNDLE"] == 16 * 18
            with planned(groups=16, maxnreg=96):
                assert cases.plan_of(small, backward).maxnreg == 96
            with planned(num_warps=2):
                assert cases.plan_of(small, backward).groups < 16
                assert cases.case_of(small, backward).launches[0].num_warps == 2
        with planned(resident=True), pytest.raises(ValueError, match="no resident tile of any groups"):
            cases.plan_of(large, backward)
        with planned(groups=5), pytest.raises(ValueError, match="no resident tile of 5 groups"):
            cases.plan_of(small, backward)
        dropping = cases.Norm(32, 256, 32, dropout=True)
        assert cases.plan_of(dropping, backward).resident  # split would draw its mask twice
        with planned(groups=1), pytest.raises(ValueError, match="no resident tile of 1 groups"):
            cases.plan_of(replace(small, dropout=True), backward)  # 8 channels share one draw
    assert before == [cases.plan_of(norm, b) for norm in (small, large) for b in (False, True)]
    for wrong in ({"rows": 24}, {"num_warps": 0}, {"groups": 2, "resident": False}):
        with pytest.raises(ValueError, match=next(iter(wrong))), planned(**wrong):
            pass
