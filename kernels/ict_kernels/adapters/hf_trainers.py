"""Hugging Face's trainers with an elementwise Huber loss: `conditional_loss` of the scheduled-Huber scripts.

Their convention: conditional_loss(model_pred, target, reduction, loss_type, huber_c), "huber" being
2 c (sqrt(e^2 + c^2) - c) of each element and "smooth_l1" the same without the factor c. Here the elementwise
metric is what is meant, so nothing is corrected; it is computed in one pass, in fp32. (The consistency
distillation scripts write it out: there `pseudo_huber_loss(prediction, target, c=args.huber_c,
norm="element", reduction="mean")` takes its place.) Two of the scripts have a function of that name that is
another: train_dreambooth_lora_sdxl.py's weights each image, train_text_to_image_lora_sdxl.py's lacks the 2.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..consistency_loss import _pseudo_huber, _wide, pseudo_huber_loss
from .patch import Patch, ours, owners


@ours
def conditional_loss(
    model_pred: Tensor,
    target: Tensor,
    reduction: str = "mean",
    loss_type: str = "l2",
    huber_c: float | Tensor = 0.1,
) -> Tensor:
    """The scripts' function of this name; the target receives no gradient from "huber" and "smooth_l1".

    Args:
        model_pred, target: equal shapes (N, ...), any floating dtype.
        reduction: "mean" or "sum" over all elements, or "none".
        loss_type: "l2", "huber" or "smooth_l1".
        huber_c: a number, or of a schedule a tensor that broadcasts to model_pred.
    Returns:
        A scalar, or for "none" the shape of model_pred; for the Huber losses fp32, or float64 if an image is.
    Raises:
        NotImplementedError: for another loss_type, as in the scripts.
        ValueError: for shapes that differ, or another reduction.
    """
    if loss_type == "l2":
        return F.mse_loss(model_pred, target, reduction=reduction)
    if loss_type not in ("huber", "smooth_l1"):
        raise NotImplementedError(f"Unsupported Loss Type {loss_type}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if model_pred.shape != target.shape:
        raise ValueError(
            f"shapes must be equal, got model_pred {tuple(model_pred.shape)}, target {tuple(target.shape)}"
        )
    factor = 2.0 * huber_c if loss_type == "huber" else 2.0
    if reduction == "none" or isinstance(huber_c, Tensor):
        squares = (_wide(model_pred) - _wide(target.detach())).square()
        c = torch.as_tensor(huber_c, dtype=squares.dtype, device=squares.device)
        loss = factor * _pseudo_huber(squares, c)
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    loss = factor * pseudo_huber_loss(model_pred, target, c=huber_c, norm="element", reduction="mean")
    return loss if reduction == "mean" else loss * model_pred.numel()


def apply_ict_kernels_to_hf_trainers(script: Any) -> Patch:
    """Replaces a script's `conditional_loss`, which is tried first: it must be the same function.

    Args:
        script: the script as a module, or sys.modules["__main__"] from inside it.
    Returns:
        Call it to undo.
    Raises:
        ValueError: if it has no conditional_loss, or another.
    """
    module = owners(script, ("conditional_loss",), "script", "a script that defines it")[0]
    if (reason := _why_not(module.conditional_loss)) is not None:
        name = getattr(module, "__name__", module)
        raise ValueError(f"{name!r} has another conditional_loss than the one known here: {reason}")
    return Patch({(module, "conditional_loss"): conditional_loss})


def _why_not(theirs: Callable[..., Any]) -> str | None:
    """Why a script's function cannot be replaced by ours; None if it can."""
    others = inspect.signature(theirs).parameters.keys() - inspect.signature(conditional_loss).parameters
    if others:
        return f"it takes {', '.join(sorted(others))}"
    prediction = torch.tensor([[0.5, -3.0], [0.0, 0.1]], device="cpu")
    target = torch.zeros_like(prediction)
    for loss_type in ("l2", "huber", "smooth_l1"):
        arguments: dict[str, Any] = {"reduction": "none", "loss_type": loss_type, "huber_c": 0.2}
        try:
            expected = theirs(prediction, target, **arguments)
        except NotImplementedError:
            continue  # it is not called with that one
        if not torch.allclose(conditional_loss(prediction, target, **arguments), expected, rtol=1e-4):
            return f"its {loss_type!r} is another"
    return None
