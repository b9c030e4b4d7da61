"""The tables by which the kernels of RAdam + EMA reach the tensors of a cohort, however many.

In chunks of at most CHUNK_SIZE elements:
    tensors    int64 [tensors, 6]: addresses of p, exp_avg, exp_avg_sq, ema and step; number of elements
    gradients  int64 [tensors]: addresses of the gradients, which may move from step to step
    chunks     int32 [chunks, 2]: tensor, and which of its chunks
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_SIZE = 8192
COLUMNS = 6
# What a parameter has beside itself, in the order of the columns.
STATE = ("exp_avg", "exp_avg_sq", "ema", "step")


class Plan:
    """The tables of one cohort.

    Attributes:
        places: addresses of p and of its state, shapes and strides of p, that the tables were made from.
        tensors, chunks: as the kernels read them.
        aligned: whether p, exp_avg, exp_avg_sq and ema all begin at multiples of 16 bytes.
        first_step: `step` of the first parameter, which is that of all.
    """

    def __init__(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], places: tuple[list[Any], ...]
    ) -> None:
        self.device = params[0].device
        self.places = places
        addresses, *_ = places
        rows = torch.tensor([*addresses, [p.numel() for p in params]], device="cpu").T.contiguous()
        counts = torch.tensor([max(1, -(-p.numel() // CHUNK_SIZE)) for p in params], device="cpu")
        tensor = torch.repeat_interleave(torch.arange(len(params), device="cpu"), counts)
        chunk = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
        chunks = torch.stack([tensor, chunk], 1).to(torch.int32)
        self.tensors = _to_send(rows, self.device).to(self.device, non_blocking=True)
        self.chunks = _to_send(chunks, self.device).to(self.device, non_blocking=True)
        self.aligned = all(address % 16 == 0 for column in addresses[:-1] for address in column)
        self.first_step = states[0]["step"]
        self._addresses: list[int] = []
        self._gradients = torch.zeros(len(params), dtype=torch.int64, device=self.device)

    def gradients_of(self, params: list[Tensor]) -> list[Tensor]:
        """The gradients, each as `as_stored` has it; raises what that raises."""
        # In every step, for hundreds of parameters: nothing is called for a gradient that is as it should be.
        return [
            g if g.stride() == strides and g.shape == shape and g.dtype is torch.float32 else as_stored(g, p)
            for p, shape, strides in zip(params, *self.places[1:], strict=True)
            if (g := p.grad) is not None
        ]

    def find(self, grads: list[Tensor], capturing: bool) -> Tensor:
        """The table of the gradients, written anew when one has moved; the host never waits for that."""
        addresses = [g.data_ptr() for g in grads]
        if capturing:
            # A table of the graph's own, since later steps rewrite the other; its addresses are arguments of
            # recorded launches, for there is no host memory that lives as long as the graph.
            table = torch.zeros_like(self._gradients)
            torch._foreach_add_(list(table.unbind()), addresses)
            return table
        if addresses != self._addresses:
            table = torch.tensor(addresses, device="cpu")
            self._gradients.copy_(_to_send(table, self.device), non_blocking=True)
            self._addresses = addresses
        return self._gradients


def fits(p: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether the kernels take a parameter: fp32, without gaps, its state of its shape and order."""
    # The state was made dense, so what is stored like it is dense too.
    return all(t.dtype == torch.float32 and t.device == p.device for t in (p, *state.values())) and all(
        _stored_alike(state[name], p) for name in STATE[:3]
    )


def _stored_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of one index lie at the same place in both."""
    if a.shape != b.shape:
        return False
    return a.stride() == b.stride() or all(
        size <= 1 or one == other for size, one, other in zip(b.shape, a.stride(), b.stride(), strict=True)
    )


def misfit(grad: Tensor, p: Tensor) -> RuntimeError:
    """To be raised for a gradient of another shape than its parameter's."""
    return RuntimeError(
        f"a parameter of shape {tuple(p.shape)} has a gradient of shape {tuple(grad.shape)}, of before it"
        " changed its shape: set or clear that too"
    )


def as_stored(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient in the parameter's order of storage and dtype: itself where it already is.

    Raises:
        RuntimeError: if it has another shape.
    """
    if grad.dtype == p.dtype and _stored_alike(grad, p):
        return grad
    if grad.shape != p.shape:
        raise misfit(grad, p)
    return torch.empty_like(p, memory_format=torch.preserve_format).copy_(grad)


def _to_send(values: Tensor, device: torch.device) -> Tensor:
    """Where a copy need not be waited for: torch keeps pinned memory until the copies of it are made."""
    return values.pin_memory() if device.type == "cuda" else values
