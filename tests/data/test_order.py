"""The order of the images against what an order must be: complete, repeatable, independent, and pinned."""

import numpy as np
import pytest

from ict_fast.data.order import batch_indices, epoch_permutation, rank_slice
from ict_fast.errors import InputError


@pytest.mark.parametrize("num_images", [1, 2, 37, 1797])
def test_an_epoch_holds_every_image_exactly_once(num_images: int) -> None:
    for epoch in range(3):
        assert sorted(epoch_permutation(num_images, 5, epoch)) == list(range(num_images))


def test_the_order_never_changes_between_versions() -> None:
    # Written down when the format was fixed: a run that resumes under another NumPy must go on in its order.
    assert epoch_permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_permutation(10, 2**63 - 1, 5).tolist() == [8, 5, 3, 6, 9, 1, 7, 0, 2, 4]


def test_the_order_is_that_of_the_published_philox_words() -> None:
    words = [philox4x64(counter, key=(11, 3)) for counter in (1, 2, 3)]  # NumPy counts before it draws
    expected = sorted(range(12), key=[word for block in words for word in block].__getitem__)
    assert epoch_permutation(12, 11, 3).tolist() == expected


def philox4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 in Python's integers, from Salmon et al., SC 2011."""
    mask = 2**64 - 1
    c, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        product0, product1 = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(product1 >> 64) ^ c[1] ^ k0, product1 & mask, (product0 >> 64) ^ c[3] ^ k1, product0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


def test_orders_of_different_epochs_and_seeds_are_uncorrelated() -> None:
    count = 20_000
    orders = [epoch_permutation(count, seed, epoch) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    correlation = np.corrcoef([np.arange(count), *orders])
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(count)  # five standard deviations


def test_neighbours_in_the_store_are_not_neighbours_in_the_order() -> None:
    order = epoch_permutation(20_000, 0, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize("batch_size", [1, 8, 36, 37, 38, 100])
def test_batches_are_cut_from_the_endless_sequence_of_epochs(batch_size: int) -> None:
    endless = np.concatenate([epoch_permutation(37, 9, epoch) for epoch in range(20)])
    for step in range(len(endless) // batch_size):
        indices, numbers = batch_indices(37, 9, step, batch_size)
        assert numbers.tolist() == list(range(step * batch_size, (step + 1) * batch_size))
        np.testing.assert_array_equal(indices, endless[numbers])
        assert indices.dtype == numbers.dtype == np.int64


def test_any_step_is_reached_without_the_steps_before_it() -> None:
    in_order = [batch_indices(37, 1, step, 10)[0].tolist() for step in range(50)]
    for step in (49, 0, 17, 3, 48):
        epoch_permutation.cache_clear()
        assert batch_indices(37, 1, step, 10)[0].tolist() == in_order[step]


def test_the_last_step_of_the_longest_run_has_a_batch() -> None:
    indices, numbers = batch_indices(1797, 2**63 - 1, 2**32 - 1, 4096)
    assert numbers[-1] == 2**32 * 4096 - 1
    assert indices.min() >= 0
    assert indices.max() < 1797


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_ranks_share_the_batch_without_gap_or_overlap(world_size: int) -> None:
    shares = [range(24)[rank_slice(24, rank, world_size)] for rank in range(world_size)]
    assert [place for share in shares for place in share] == list(range(24))
    assert {len(share) for share in shares} == {24 // world_size}


def test_a_batch_that_cannot_be_shared_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"--training\.batch-size is 10.* 4 processes"):
        rank_slice(10, 0, 4)


def test_a_cached_order_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(10, 0, 0)[0] = 3
