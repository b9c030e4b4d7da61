"""Dropout: on if and only if a seed is passed, and a pure function of it and of the place in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ict_fast.config import NetworkConfig
from ict_fast.networks import UNet
from ict_kernels.philox import dropout_keep_mask

Model = tuple[UNet, tuple[Tensor, Tensor, Tensor | None]]


@pytest.fixture
def model(small_config: NetworkConfig, make_network: Callable, make_inputs: Callable) -> Model:
    config = replace(small_config, dropout=0.3)
    return make_network(config), make_inputs(config, 4)


def test_without_a_seed_there_is_none_even_in_train_mode(model: Model) -> None:
    network, inputs = model
    plain = network.eval()(*inputs)
    assert torch.equal(network.train()(*inputs), plain)
    assert not torch.allclose(network.eval()(*inputs, dropout_seed=1), plain)


def test_one_seed_gives_one_mask(model: Model) -> None:
    network, inputs = model
    first = network(*inputs, dropout_seed=5)
    torch.randn(7)  # the global generator plays no part
    assert torch.equal(network(*inputs, dropout_seed=5), first)
    assert not torch.allclose(network(*inputs, dropout_seed=6), first)


def test_step_is_part_of_the_seed(model: Model) -> None:
    network, inputs = model
    outputs = [network(*inputs, dropout_seed=torch.tensor([5, step])) for step in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_splitting_the_batch_changes_nothing(model: Model) -> None:
    network, (images, noise, labels) = model
    seed = torch.tensor([5, 3])
    whole = network(images, noise, labels, dropout_seed=seed, dropout_offset=10)
    for start, stop in ((0, 1), (1, 4)):
        part = network(
            images[start:stop],
            noise[start:stop],
            None if labels is None else labels[start:stop],
            dropout_seed=seed,
            dropout_offset=10 + start,
        )
        torch.testing.assert_close(part, whole[start:stop], atol=1e-5, rtol=1e-4)


def test_every_block_draws_the_mask_of_its_number(model: Model) -> None:
    network, inputs = model
    given: list[Tensor] = []
    for block in network.blocks():
        block.norm1.register_forward_pre_hook(
            lambda _, arguments, others: given.append(others["seed"]), with_kwargs=True
        )
    network(*inputs, dropout_seed=torch.tensor([5, 3]))
    assert len(given) == len(list(network.blocks()))
    for number, seed in enumerate(given):
        mask = dropout_keep_mask((2, 4, 6, 6), 0.3, seed)
        assert torch.equal(mask, dropout_keep_mask((2, 4, 6, 6), 0.3, torch.tensor([5, 3]), layer=number))


def test_dropout_stops_above_its_resolution(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    config = replace(small_config, dropout=0.5, dropout_max_resolution=4)
    network, inputs = make_network(config), make_inputs(config)
    width = config.channels
    block = network.encoder[0].blocks[0]
    x, embedding = torch.randn(2, width, 8, 8), torch.randn(2, 4 * width)
    assert torch.equal(block(x, embedding, 1), block(x, embedding))
    assert not torch.allclose(network.encoder[1].down(x, embedding, 1), network.encoder[1].down(x, embedding))
    assert not torch.allclose(network(*inputs, dropout_seed=1), network(*inputs))


def test_a_rate_of_zero_is_no_dropout(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network, inputs = make_network(small_config), make_inputs(small_config)
    assert torch.equal(network(*inputs, dropout_seed=1), network(*inputs))
