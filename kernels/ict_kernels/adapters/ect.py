"""ECT ("Consistency Models Made Easy"; locuslab/ect) as a loss class for ECT's, EDM's and EDM2's trainers.

Their convention: class and options come by name, `construct_class_by_name(class_name=..., P_mean=...)`; the
object is pickled into snapshots; it is called as loss(net=, images=, labels=, augment_pipe=) and calls
net(noisy images, sigma (N, 1, 1, 1), labels, augment_labels=) for denoised images. ECT wants (N,) back and
means it; EDM and EDM2 sum whatever comes, so for them too (N,) is right.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..consistency_loss import pseudo_huber_loss
from ..shared_dropout import SharedDropout, forget_casts
from .patch import Patch, ours, owners


@ours
class ECMLoss:
    """ECT's loss: continuous t ~ lognormal, r = t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), clipped at 0.

        loss = d(D(y + t eps, t), stopgrad D(y + r eps, r)) / (t - r),   d = sqrt(||.||^2 + c^2) - c

    Where r = 0 the target is the image itself. The same noise and dropout masks serve both; the teacher's
    pass comes first, since EDM2's layers normalise their weights in place as they run, which between the
    student's pass and its gradient autograd forbids. Nothing waits for the device.

    Args:
        P_mean, P_std: of ln t.
        sigma_data: kept for the trainers' logs; the preconditioning is the network's.
        q: each stage divides the gap t - r by q.
        c: of the Pseudo-Huber metric; 0, the default, is the L2 norm.
        k, b: of the sigmoid; near t = 0 the gap is 1 + k / 2 times as wide.
        cut: accepted for ECT's signature, and read by neither.
        adj: "sigmoid", or "const" for r = t (1 - q^-(stage + 1)).
    Attributes:
        stage, ratio: as ECT's; set by `update_schedule`.
    Raises:
        ValueError: for another adj.
    Source:
        Geng et al., "Consistency Models Made Easy", 2024, section 3.
    """

    def __init__(
        self,
        P_mean: float = -1.1,
        P_std: float = 2.0,
        sigma_data: float = 0.5,
        q: float = 2,
        c: float = 0.0,
        k: float = 8.0,
        b: float = 1.0,
        cut: float = 4.0,
        adj: str = "sigmoid",
    ) -> None:
        if adj not in ("sigmoid", "const"):
            raise ValueError(f"adj must be 'sigmoid' or 'const', got {adj!r}")
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data
        self.q, self.c, self.k, self.b, self.cut, self.adj = q, c, k, b, cut, adj
        self.stage, self.ratio = 0, 0.0

    def update_schedule(self, stage: int) -> None:
        """Goes to a stage, 0, 1, 2, ...: ECT's loop calls it; in EDM's and EDM2's it is a line to add.

        Raises:
            ValueError: for a stage whose t and r are equal in fp32, where the loss would be NaN.
        """
        if (stage + 1) * math.log2(self.q) >= 23:
            raise ValueError(
                f"at stage {stage} the gap t - r is t / {self.q:g}^{stage + 1}, which fp32 does not resolve;"
                f" stop at stage {math.ceil(23 / math.log2(self.q)) - 2} or before"
            )
        self.stage = stage
        self.ratio = 1 - 1 / self.q ** (stage + 1)

    def t_to_r(self, t: Tensor) -> Tensor:
        """The teacher's level for the student's; any shape."""
        adjustment = 1.0 if self.adj == "const" else 1 + self.k * torch.sigmoid(-self.b * t)
        return (t * (1 - adjustment / self.q ** (self.stage + 1))).clamp_min(0)

    def __call__(
        self, net: Any, images: Tensor, labels: Tensor | None = None, augment_pipe: Any = None
    ) -> Tensor:
        """The loss of each image.

        Args:
            net: as described at the top of this file.
            images: (N, C, H, W), fp32 in the network's range.
            labels: passed on.
            augment_pipe: images -> (images, augment_labels), or None.
        Returns:
            (N,) fp32.
        """
        level_shape = [images.shape[0], *[1] * (images.dim() - 1)]
        t = (torch.randn(level_shape, device=images.device) * self.P_std + self.P_mean).exp()
        r = self.t_to_r(t)
        y, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        noise = torch.randn_like(y)
        # EDM2's networks do not know the option, and EDM's take its absence for None.
        extra = {} if augment_labels is None else {"augment_labels": augment_labels}

        masks = SharedDropout(net, images.device)
        with masks, torch.no_grad():
            # A level of 0 has no logarithm: such images go in at t, and what comes out is not used.
            level = torch.where(r > 0, r, t)
            target = torch.where(r > 0, net(y + noise * level, level, labels, **extra), y)
        forget_casts()
        with masks:
            prediction = net(y + noise * t, t, labels, **extra)
        return pseudo_huber_loss(prediction, target, 1 / (t - r).flatten(), c=float(self.c))


def apply_ict_kernels_to_ect(loss_module: Any) -> Patch:
    """Replaces ECT's `ECMLoss` by the one of this file: `training.loss.ECMLoss` then names ours.

    Args:
        loss_module: the module training.loss of ECT.
    Returns:
        Call it to undo.
    Raises:
        ValueError: if the module has no ECMLoss.
    """
    module = owners(loss_module, ("ECMLoss",), "loss", "training.loss of ECT")[0]
    return Patch({(module, "ECMLoss"): ECMLoss})
