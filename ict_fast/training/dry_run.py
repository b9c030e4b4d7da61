"""What `train` would do, in words: `ict-fast train --dry-run`."""

from __future__ import annotations

from pathlib import Path

from ict_fast.config import Config, validate
from ict_fast.data.order import micro_batch_size
from ict_fast.errors import InputError
from ict_fast.training.describe import describe, describe_initial_share, describe_unused
from ict_fast.training.evaluations import require_features, require_measurable, require_measurement
from ict_fast.training.graph import require_capturable
from ict_fast.training.initial import initial_weights
from ict_fast.training.launch import resolve_processes
from ict_fast.training.run_data import open_data, will_prepare
from ict_fast.training.run_directory import open_run
from ict_fast.training.step import describe_trunk, require_arithmetic
from ict_fast.training.trackers import chosen_tracker


def dry_run(
    config: Config,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    gpus: int | None = None,
    processes: int | None = None,
    resume: str = "auto",
    extend: int | None = None,
    init: Path | str | None = None,
) -> str:
    """What `train` would do with the same arguments, in words; writes nothing.

    What is missing on this machine (data, a device, features, a tracker) is said so, not raised: a run may
    be planned elsewhere.

    Raises:
        InputError: if the input cannot work, or the run that is there is another one.
    """
    validate(config)
    require_features(config)
    out = Path("runs") / config.preset if out is None else Path(out)
    lines: list[str] = []
    init = None if init is None else Path(init)
    run = open_run(config, out, resume, extend, lambda text: lines.append(f"warning: {text}"), init)
    config, total = run.config, f"{run.config.training.total_steps:,}"
    if unused := describe_unused(config):
        lines.append(f"warning: {unused}")
    if run.finished:
        lines.append(f"run: {out} is finished, its {total} steps are done")
    elif run.step:
        lines.append(f"run: {out} would go on from step {run.step:,} of {total}")
    else:
        lines.append(f"run: {out} would start")
        if initial_share := describe_initial_share(config):
            lines.append(f"warning: {initial_share}")
        if run.initial is not None:
            lines += initial_weights(run.initial, config)[1].lines()
    try:
        found, count = resolve_processes(device, gpus, processes)
        lines.append(f"device: {found}" if count == 1 else f"device: {found.type}, {count} processes")
        require_arithmetic(config.training.precision, found)
        if trunk := describe_trunk(config.training.precision, found):
            lines.append(f"precision: {trunk}")
        if config.training.cuda_graph:
            require_capturable(found, config.data.loader)
        micro_batch_size(config.training.batch_size, count, config.training.micro_batch)
    except InputError as error:
        lines.append(f"device: not here: {error}")
    check = require_measurable
    try:
        if will_prepare(config):
            lines.append(f"data: {config.data.path} would be prepared")
        else:
            store = open_data(run)
            lines.append(f"data: {store.path}, {store.num_images:,} images")
            check = require_measurement
    except InputError as error:
        lines.append(f"data: not ready: {error}")
    try:
        check(config)
    except InputError as error:
        lines.append(f"measurements: not here: {error}")
    try:
        chosen_tracker(config)
    except InputError as error:
        lines.append(f"tracker: not here: {error}")
    return "\n".join([describe(config, run.extensions), *lines])
