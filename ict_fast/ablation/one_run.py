"""One run of an ablation in a process of its own: a job on standard input, a result in its folder.

`python -m ict_fast.ablation.one_run`. A process each, so that a run that fails or needs too much memory takes
no other with it, and so that each has its own number of threads or its own GPU.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ict_fast import errors
from ict_fast.children import end_with
from ict_fast.config import from_dict
from ict_fast.durable import replace_durably
from ict_fast.errors import DivergedError, InputError, TrainingError

RUN, RESULT, OUTPUT = "run", "result.json", "output.txt"


@dataclass(frozen=True)
class Job:
    """What a process is told.

    Attributes:
        folder: where the run, its output and its result go.
        config: of the run, as `config.to_dict` gives it.
        device: "cuda" or "cpu".
        count: images to sample per number of steps; None for the evaluation's default.
        steps: numbers of sampling steps to measure.
    """

    folder: str
    config: dict[str, Any]
    device: str
    count: int | None
    steps: tuple[int, ...]


def do(job: Job) -> int:
    """Trains and evaluates; returns the exit code. A run that diverges has a result too: why it has none.

    Raises:
        InputError, TrainingError: what says nothing of the variant, such as a full disk or too little memory:
            the run has no result, and can be made again.
    """
    from ict_fast.consistency import load_model
    from ict_fast.consistency.objective import revision
    from ict_fast.evaluation import evaluate
    from ict_fast.training.trainer import train

    folder, config = Path(job.folder), from_dict(job.config)
    result: dict[str, Any] = {
        "config": job.config,
        "objective_revision": revision(config.method),
        "asked_count": job.count,
    }
    started = time.monotonic()
    try:
        trained = train(config, out=folder / RUN, device=job.device)
        if trained.exit_code:
            return trained.exit_code
        model = load_model(folder / RUN, device=job.device)
        result |= evaluate(model, Path(config.data.path), steps=job.steps, count=job.count)
    except DivergedError as error:
        result["failed"] = str(error)
    result["seconds"] = round(time.monotonic() - started, 1)
    replace_durably(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return errors.EXIT_DONE


def main() -> int:
    told = json.load(sys.stdin)
    end_with(told.pop("parent"))  # which may be killed, and begin again while this run goes on
    try:
        return do(Job(**told))
    except InputError as error:
        print(f"ict-fast: error: {error}", file=sys.stderr)
        return errors.EXIT_BAD_INPUT
    except TrainingError as error:
        print(f"ict-fast: error: {error}", file=sys.stderr)
        return errors.EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
