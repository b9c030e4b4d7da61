"""Which implementation the ops use: the process-wide choice of `set_backend`."""

_BACKENDS = ("auto", "triton", "eager", "apex")
_chosen = "auto"


def set_backend(name: str) -> None:
    """Choose the implementation of every op of this package, for the whole process.

    Args:
        name: "eager", the PyTorch definitions; "auto", the fastest that this version has for the device.
            This version has eager definitions only, so both mean the same.
    Raises:
        RuntimeError: for "triton" and "apex", which this version does not hold.
        ValueError: for any other name.
    """
    global _chosen
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(_BACKENDS)}")
    if name in ("triton", "apex"):
        raise RuntimeError(f"this version of ict_kernels has no {name} kernels; use 'auto' or 'eager'")
    _chosen = name


def get_backend() -> str:
    """The backend last chosen by `set_backend`; "auto" at first."""
    return _chosen
