"""The same consistency functions, learned: the project's own objective and optimizer, and a small network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from closed_forms.mixture import Mixture
from closed_forms.ring import Ring
from ict_fast.config import MethodConfig
from ict_fast.consistency.curriculum import num_scales, stages
from ict_fast.consistency.model import noise_condition
from ict_fast.consistency.objective import ConsistencyObjective
from ict_kernels import RAdamEMA, c_in, c_out, c_skip

Array = NDArray[np.float64]

_C_NOISE = "log"


@dataclass(frozen=True)
class Training:
    """How long and how large."""

    steps: int = 6000
    batch_size: int = 512
    width: int = 64
    lr: float = 4e-3
    ema_decay: float = 0.998


class SmallNetwork(nn.Module):
    """F for images of one or two values: a multilayer perceptron of (c_in x, c_noise)."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(values + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, values),
        )

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        *,
        dropout_seed: Tensor | int | None = None,
        dropout_offset: Tensor | int = 0,
    ) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), noise[:, None]], dim=1)).view_as(x)


def learn(problem: Mixture | Ring, method: MethodConfig, training: Training, seed: int) -> SmallNetwork:
    """Consistency training; the rate falls to 0 over the second half, the average of the weights is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNetwork(problem.values, training.width)
    scales = [stage.num_scales for stage in stages(training.steps, method)]
    objective = ConsistencyObjective(network, method, c_noise=_C_NOISE, scales=scales)
    ema_decay, lr = torch.tensor(0.0), torch.tensor(training.lr)
    optimizer = RAdamEMA(network.parameters(), lr=lr, ema_decay=ema_decay)
    generator = torch.Generator().manual_seed(seed + 1)
    for step in range(training.steps):
        images = problem.images(training.batch_size, generator)
        optimizer.zero_grad()
        count = num_scales(step, training.steps, method)
        objective(images, None, num_scales=count, seed=torch.tensor([seed, step])).mean().backward()
        ema_decay.fill_(min(training.ema_decay, (step + 1) / (step + 10)))
        lr.fill_(training.lr * min(1.0, 2 * (1 - step / training.steps)))
        optimizer.step()
    with torch.no_grad():
        for parameter, average in zip(network.parameters(), optimizer.ema_parameters(), strict=True):
            parameter.copy_(average)
    return network


@torch.no_grad()
def learned_function(network: SmallNetwork, problem: Mixture | Ring, y: Array, sigma: float) -> Array:
    """f of the network at positions y, of a ring in 16 directions.

    Returns:
        (M, directions, values): f, turned back so that its first value is the component along y.
    """
    directions = 16 if problem.values == 2 else 1
    angle = torch.arange(directions, dtype=torch.float64) * (2 * np.pi / directions)
    frame = torch.stack([angle.cos(), angle.sin()], dim=1)[:, : problem.values]  # (directions, values)
    x = (torch.from_numpy(y)[:, None, None] * frame).float().reshape(-1, problem.values, 1, 1)
    level = torch.full((len(x),), sigma)
    level_n111 = level.view(-1, 1, 1, 1)
    output = network(c_in(level_n111) * x, noise_condition(level, _C_NOISE))
    f = (
        (c_skip(level_n111) * x + c_out(level_n111) * output)
        .double()
        .view(len(y), directions, problem.values)
    )
    if problem.values == 1:
        return f.numpy()
    along = (f * frame).sum(dim=2)
    across = f[:, :, 1] * frame[:, 0] - f[:, :, 0] * frame[:, 1]
    return torch.stack([along, across], dim=2).numpy()
