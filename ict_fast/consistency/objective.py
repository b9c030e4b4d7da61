"""The consistency training objective: one batch of images in, one weighted loss per image out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ict_fast.config import MethodConfig
from ict_fast.consistency.model import noise_condition
from ict_kernels import NoiseLevels, consistency_loss, noise_images, sample_noise_levels

_REVISIONS = {"l2": 2, "l1": 2}  # means over the image, which were sums


def revision(method: MethodConfig) -> int:
    """A number that rises when the same configuration begins to compute another objective.

    A run that has begun with another one does not go on.
    """
    return _REVISIONS.get(method.metric, 1)


class ConsistencyObjective:
    """lambda(s_i) d(f(x + s_{i+1} z, s_{i+1}), stopgrad f(x + s_i z, s_i)) per image (iCT, equation 7).

    Student and teacher share x, z and the dropout mask. The teacher is the student itself unless another
    network is given. Everything random is a function of (seed, step, number of the sample in the global
    batch), so the loss of an image does not depend on how the batch is split.
    """

    def __init__(
        self,
        student: nn.Module,
        method: MethodConfig,
        *,
        c_noise: str,
        scales: Sequence[int],
        teacher: nn.Module | None = None,
    ) -> None:
        """
        Args:
            student: network F, see `ict_fast.networks`.
            method: every ingredient of the objective.
            c_noise: see `noise_condition`.
            scales: the values that N(k) takes in this run.
            teacher: the EMA network of the 2023 method, or None.
        """
        self.student = student
        self.teacher = student if teacher is None else teacher
        self.method = method
        self.c_noise = c_noise
        self.scales = tuple(sorted(set(scales)))
        self._offsets: dict[int, Tensor] = {}

    def levels(
        self, count: int, *, num_scales: Tensor | int, seed: Tensor | int, offset: int, device: torch.device
    ) -> NoiseLevels:
        """The noise levels that so many images are trained at; arguments as for the loss."""
        method = self.method
        return sample_noise_levels(
            count,
            num_scales,
            p_mean=method.p_mean,
            p_std=method.p_std,
            sigma_min=method.sigma_min,
            sigma_max=method.sigma_max,
            rho=method.rho,
            indices=method.indices,
            weighting=method.weighting,
            scales=self.scales,
            seed=seed,
            offset=offset,
            device=device,
        )

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        num_scales: Tensor | int,
        seed: Tensor | int,
        offset: int = 0,
        flip: Tensor | None = None,
        levels: NoiseLevels | None = None,
    ) -> Tensor:
        """Weighted loss of each image, (N,) fp32.

        Args:
            images: (N, H, W, C) uint8, or (N, C, H, W) float in [-1, 1].
            labels: (N,) int64 or None.
            num_scales: N(k), a number or an int64 device tensor holding one of `scales`.
            seed: run seed, or int64 (2,) tensor (run seed, step).
            offset: number of the first image in the global batch.
            flip: (N,) uint8, 1 where the image is mirrored.
            levels: what `levels` gives for the same arguments, if the caller has drawn them already.
        """
        method = self.method
        if levels is None:
            levels = self.levels(
                images.shape[0], num_scales=num_scales, seed=seed, offset=offset, device=images.device
            )
        student_input, teacher_input = noise_images(
            images, levels, seed=seed, offset=offset, flip=flip, sigma_data=method.sigma_data
        )
        if offset not in self._offsets:  # as a number it would be a constant of the compiled network
            self._offsets[offset] = torch.tensor(offset, device=images.device)
        # The teacher goes first: it keeps no activations, so the peak memory is the student's alone.
        with torch.no_grad():
            teacher_output = self.teacher(
                teacher_input,
                noise_condition(levels.sigma, self.c_noise),
                labels,
                dropout_seed=seed,
                dropout_offset=self._offsets[offset],
            )
        student_output = self.student(
            student_input,
            noise_condition(levels.sigma_next, self.c_noise),
            labels,
            dropout_seed=seed,
            dropout_offset=self._offsets[offset],
        )
        return consistency_loss(
            student_output,
            teacher_output,
            student_input,
            teacher_input,
            levels,
            sigma_data=method.sigma_data,
            sigma_min=method.identity_sigma,
            c=method.huber_c,
            metric=method.metric,
        )
