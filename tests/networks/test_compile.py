"""What the compiled step relies on: no graph break, and nothing that changes from step to step recompiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch._dynamo.testing import CompileCounter

from ict_fast.config import NetworkConfig


def test_network_is_one_graph_with_and_across_seeds(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    """Traced, not compiled to machine code: that is the trainer's test."""
    config = replace(small_config, dropout=0.3, channel_mult=(1, 2), attention_resolutions=(4,))
    network, inputs = make_network(config), make_inputs(config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(3):
            seed = torch.tensor([5, step])
            torch.testing.assert_close(
                compiled(*inputs, dropout_seed=seed), network(*inputs, dropout_seed=seed), atol=1e-6, rtol=0
            )
    assert counter.frame_count == 1
    torch._dynamo.reset()
