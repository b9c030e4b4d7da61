"""The loss scale of an fp16 trunk, which lives on the device."""

from __future__ import annotations

import torch
from torch import Tensor

# A gradient of fp16 activations below 6e-8 is zero and above 65,504 infinite. The mean of lambda doubles with
# every stage of the curriculum, so the scale must follow: it halves with every step that overflows, and
# doubles after so many that did not (a step in 400 is lost to trying).
_FIRST = 2.0**14
_LEAST, _MOST = 1.0, 2.0**24
_GOOD_STEPS_TO_DOUBLE = 400


class LossScale:
    """Multiplies the loss, so that the gradients of activations fit fp16; nothing here waits for the device.

    Attributes:
        value: the scale, an fp32 scalar on the device; the optimizer divides the gradients by it.
        good_steps: steps since it last changed, an int64 scalar.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(_FIRST, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def advance(self, skipped: Tensor) -> None:
        """Follows a step.

        Args:
            skipped: 0-dim bool, whether its gradient was not finite.
        """
        self.good_steps.add_(1).mul_(~skipped)
        doubles = self.good_steps >= _GOOD_STEPS_TO_DOUBLE
        self.value.mul_(torch.where(skipped, 0.5, torch.where(doubles, 2.0, 1.0))).clamp_(_LEAST, _MOST)
        self.good_steps.mul_(~doubles)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"loss_scale": self.value, "loss_scale_good_steps": self.good_steps}
