"""The torchrun that has started this process: it starts again what ends with an error, unless it is stopped.

Imports no torch: what is wrong with a command line is said before that.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

LEAVING_SECONDS = 1.0
"""The agent looks ten times a second, and names the first process that it finds ended: so the one that is
lost, before those that have lost it."""

_CLAIM = "ict-fast-ended"


def restarts() -> int:
    """How often the launcher has started this process's group again; 0 without a launcher."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def has_others() -> bool:
    """Whether a launcher has started this process as one of several of a run."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """Ends this process at once, with what it has said so far.

    The interpreter's own end waits for threads, which may wait for the device, and that for a process that is
    lost.

    Args:
        code: its exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it was closed
            stream.flush()
    os._exit(code)


def warning() -> str | None:
    """What keeps this process's torchrun from starting lost ones again, if anything is known to."""
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not keeps_store or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    is_set = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"  # which --master-addr does not know
    cure = "start torchrun with --rdzv-backend c10d" if is_set else "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    return (
        "after a lost process torchrun lets all meet by what is left of the attempt before, which was seen to"
        f" fail: {cure}" + ("" if is_set else " where torchrun is started")
    )


def agent() -> int | None:
    """The process number of the torchrun that has started this process, or None."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    # What a worker starts has the worker's environment too, and its parent must not be stopped.
    names = {Path(os.fsdecode(word)).name for word in words}
    return parent if names & {"torchrun", "torch.distributed.run", "torch.distributed.launch"} else None


def claim() -> bool:
    """Whether this process is the first one of its node, in this attempt, that ends with an error.

    The others have the same one, or have lost the first.
    """
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/<local rank>/error.json
    if errors is None:
        return True
    try:
        (Path(errors).parents[1] / _CLAIM).touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):  # the folder is gone: torchrun is at its end
        return False
    except OSError:
        pass
    return True


def stop(agent: int) -> None:
    """Ends torchrun, which ends the node's other processes, in place of starting all of them again."""
    os.kill(agent, signal.SIGTERM)
