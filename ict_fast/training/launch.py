"""Where a run executes, and how it is asked to stop."""

from __future__ import annotations

import _thread
import os
import signal
from types import FrameType, TracebackType

import torch

from ict_fast.errors import EXIT_SIGINT, EXIT_SIGTERM, InputError
from ict_fast.hardware import nvidia_device
from ict_fast.networks.switches import configure_torch as configure_torch
from ict_fast.training.interrupts import SecondInterrupt


def resolve_device(device: str = "auto", gpus: int | None = None) -> torch.device:
    """The device that `--device` and `--gpus` mean on this machine.

    Args:
        device: "auto", "cuda" or "cpu".
        gpus: how many GPUs were asked for, or None.
    Raises:
        InputError: if it does not exist, or an NVIDIA device is there that torch cannot use: a run never
            falls back to the CPU in silence.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device is {device}; it must be auto, cuda or cpu")
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus is {gpus}; it must be at least 1 (--device cpu runs without a GPU)")
    if device == "cpu":
        if gpus is not None:
            raise InputError(f"--gpus {gpus} and --device cpu exclude each other")
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is not None and gpus > visible:
        raise InputError(
            f"--gpus is {gpus}, but torch sees {visible} here; choose at most {visible}"
            if visible
            else f"--gpus is {gpus}, but torch sees no GPU here; `ict-fast doctor` says why,"
            " --device cpu runs without one"
        )
    if visible:  # asking a CUDA that is not in use for its current device would start it, on device 0
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    if device == "cuda":
        raise InputError("--device is cuda, but torch sees no GPU here; `ict-fast doctor` says why")
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and (found := nvidia_device()):
        raise InputError(
            f"this machine has an NVIDIA device ({found}) that torch cannot use; `ict-fast doctor` says why,"
            " --device cpu runs without it"
        )
    return torch.device("cpu")


def resolve_processes(
    device: str = "auto", gpus: int | None = None, processes: int | None = None
) -> tuple[torch.device, int]:
    """The first device, and the number of processes, that a `train` command means on this node.

    Args:
        device, gpus: see `resolve_device`; without `gpus`, every GPU that is visible.
        processes: how many processes share a CPU, or None for one.
    Raises:
        InputError: as `resolve_device`; or processes on a GPU, where there is one for each GPU.
    """
    found = resolve_device(device, gpus)
    if found.type == "cuda":
        if processes is not None:
            raise InputError(
                f"--processes is {processes}, but each GPU has one process; --gpus says how many,"
                " --device cpu runs without"
            )
        return found, gpus or torch.cuda.device_count()
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}; it must be at least 1")
    return found, processes or 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save itself and stop.

    SIGHUP, the end of the terminal or of the ssh session, is one of them unless it is ignored (nohup).
    """
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hangs_up else ()))


class StopRequest:
    """Turns SIGTERM, SIGHUP and the first SIGINT into a request to save and stop; a second SIGINT interrupts.

    A context manager; the previous handlers come back at its end.

    Attributes:
        exit_code: None, or 143 (SIGTERM, SIGHUP) or 130 (SIGINT) once a stop was asked for.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._is_urgent = False
        self._second = SecondInterrupt(self._interrupt)
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not in the main thread: whoever started us owns the signals
        self._second.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._second.__exit__(kind, error, trace)
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupt(self) -> None:
        """The handler may have seen only one of two signals; it is called again for the second."""
        self._is_urgent = True
        _thread.interrupt_main(signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_urgent:
            self._is_urgent = False  # once: another would meet the clearing up
            raise KeyboardInterrupt
        if self.exit_code is None:
            self.exit_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
