"""What a step's time goes to: an operation's category by its name, torch's or a GPU kernel's."""

from __future__ import annotations

CONVOLUTION, ATTENTION, NORM, ELEMENTWISE = "convolution", "attention", "norm", "elementwise"
MATRIX, OPTIMIZER, OBJECTIVE, DATA, IDLE = (
    "other matrix products",
    "optimizer",
    "loss and noise",
    "data",
    "idle",
)
CATEGORIES = (CONVOLUTION, ATTENTION, NORM, ELEMENTWISE, MATRIX, OPTIMIZER, OBJECTIVE, DATA, IDLE)

# Of this package's kernels, whose whole names these are.
_OURS = {
    NORM: (
        "resident_forward",
        "resident_backward",
        "split_statistics",
        "split_apply",
        "split_backward",
        "merge_statistics",
        "merge_backward",
        "sum_samples",
    ),
    OPTIMIZER: ("_scalars_kernel", "_norm_kernel", "_update_kernel"),
    ELEMENTWISE: ("fir_down", "fir_up"),
    OBJECTIVE: ("_levels_kernel", "_noise_kernel", "_forward_kernel", "_backward_kernel", "_reduce_kernel"),
}
_CATEGORY_OF_OURS = {name: found for found, names in _OURS.items() for name in names}
OUR_KERNELS = frozenset(_CATEGORY_OF_OURS)

# The first that fits counts, so what has a narrow name comes before what has a wide one.
_NAMES = (
    (
        NORM,
        (
            "group_norm",
            "groupnorm",
            "native_group",
            "rowwisemoments",
            "computefusedparams",
            "computeinternalgradients",
            "computebackwardfusedparams",
            "gammabetabackward",
        ),
    ),
    (ELEMENTWISE, ("copyfunctor", "foreach_copy")),  # the trunk's weights, cast together
    (OPTIMIZER, ("radam", "multi_tensor", "foreach", "fused_adam")),
    (
        OBJECTIVE,
        (
            "consistency_loss",
            "pseudo_huber",
            "noise_images",
            "sample_noise_levels",
            "philox",
            "distribution_",
            "searchsorted",
        ),
    ),
    (ATTENTION, ("attention", "flash", "fmha", "sdpa", "softmax")),
    (DATA, ("memcpy htod", "memcpy dtoh", "index_select", "indexselect")),
    (MATRIX, ("xmma_gemm",)),  # cuBLAS's, where cuDNN's are xmma_fprop and the like
    (
        CONVOLUTION,
        (
            "conv",
            "wgrad",
            "dgrad",
            "fprop",
            "implicit",
            "winograd",
            "cudnn",
            "nchwtonhwc",
            "nhwctonchw",
            "xmma",
        ),
    ),
    (MATRIX, ("gemm", "addmm", "aten::mm", "aten::bmm", "aten.mm", "aten.bmm", "cublas", "nvjet", "cutlass")),
)


def category(name: str) -> str:
    """The category of an operation: what no rule names is elementwise (sums, casts, concatenations too)."""
    if name in _CATEGORY_OF_OURS:
        return _CATEGORY_OF_OURS[name]
    lowered = name.lower()
    if lowered.startswith(("triton_poi", "triton_red", "triton_per")):
        # Inductor names a fused kernel after all that it stands for, a convolution's bias among it.
        return NORM if "group_norm" in lowered or "var_mean" in lowered else ELEMENTWISE
    for found, parts in _NAMES:
        if any(part in lowered for part in parts):
            return found
    return ELEMENTWISE


def is_copy_of_layout(name: str) -> bool:
    """Whether a kernel is torch's copy between tensors of unlike strides; of like ones it has others."""
    return name.startswith("void at::native::elementwise_kernel<") and "direct_copy_kernel" in name
