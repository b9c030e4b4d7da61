"""All runs of an ablation: several at once, resumable, with progress and the time that is left."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ict_fast.ablation.one_run import OUTPUT, RESULT, RUN, Job
from ict_fast.ablation.variants import Variant, configured
from ict_fast.config import Config, differences, from_dict, to_dict
from ict_fast.consistency.objective import revision
from ict_fast.errors import InputError, TrainingError
from ict_fast.hardware import usable_cores
from ict_fast.screen import LINE_INTERVAL
from ict_fast.training.launch import StopRequest
from ict_fast.training.monitor import duration
from ict_fast.training.run_data import open_images, prepare_if_bundled
from ict_fast.training.run_directory import LOG_NAME

_GRACE = 60.0  # seconds that a stopped run has to save
_EVALUATION = 0.2  # of a run's time, for the estimate of what is left


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        base: iCT: every variant changes it.
        variants: see `ict_fast.ablation.variants`.
        seeds: training seeds; each variant runs with each. Others that were run are reported too.
        out: folder of all runs and of the report.
        device: "cuda" or "cpu".
        parallel: runs at once. They share the cores, or the GPUs in turn.
        count: images to sample per number of steps; None for the evaluation's default.
        steps: numbers of sampling steps to measure.
    """

    base: Config
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    out: Path
    device: str
    parallel: int
    count: int | None = None
    steps: tuple[int, ...] = (1, 2)

    def jobs(self) -> list[tuple[Variant, int, Job]]:
        """All runs, seed by seed, so that a first seed of every variant is there early."""
        return [(variant, seed, self.job(variant, seed)) for seed in self.seeds for variant in self.variants]

    def job(self, variant: Variant, seed: int) -> Job:
        """One run."""
        config = configured(self.base, variant)
        config = replace(config, training=replace(config.training, seed=seed))
        folder = self.out / variant.name / f"seed-{seed}"
        return Job(str(folder), to_dict(config), self.device, self.count, self.steps)


def run_all(plan: Plan, say: Callable[[str], None]) -> dict[str, Any] | int:
    """Runs what has not been run yet, and gathers the results.

    Args:
        plan: what to run. The same plan again goes on where it was stopped.
        say: told of each finished run, and of the progress at intervals.
    Returns:
        the report (see `gather`), or the exit code 130 or 143 after a signal: the runs have saved.
    Raises:
        InputError: results of other settings are in the folder, or a run's input cannot work.
        TrainingError: a run ended without a result; all others have theirs.
    """
    prepare_if_bundled(plan.base)
    jobs = plan.jobs()
    waiting = [(variant, seed, job) for variant, seed, job in jobs if _result(job) is None]
    if waiting:  # before any of them is started
        _require_measure(plan.base)
        open_images(plan.base)
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already")
    with StopRequest() as stop:
        code = _run(plan, waiting, stop, say)
    return gather(plan) if code is None else code


def _require_measure(base: Config) -> None:
    """Raises InputError unless runs of the preset end with a distance in units of that of noise."""
    if (base.network.resolution, base.network.image_channels) != (8, 1):
        raise InputError(
            f"--preset is {base.preset}; an ablation measures with the features of scikit-learn's digits,"
            " which know no other images: --preset digits can be run, --list shows the variants of this one"
        )


def gather(plan: Plan) -> dict[str, Any]:
    """The results of all finished runs, as JSON values: of the plan's seeds and of all others in its folder.

    Returns:
        base (the configuration), variants (name, group, label, changes, runs: seed, one_step, two_step, ...,
        or failed, and seconds), reference and features of the evaluation, count and asked_count, the
        versions, the machine, and the date (UTC).
    """
    found: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for variant in plan.variants:
        runs = []
        for seed, result in _results(plan, variant):
            kept = ("one_step", "two_step", "failed", "seconds")
            runs.append({"seed": seed, **{key: result[key] for key in kept if key in result}})
            for key in ("reference", "features", "count", "reference_fingerprint", "versions"):
                if key in result:
                    about[key] = result[key]
        found.append({**asdict(variant), "runs": runs})
    machine = {"machine": platform.machine(), "device": _device_name(plan.device), "parallel": plan.parallel}
    if plan.device == "cpu":
        machine["threads"] = _threads_each(plan)
    date = datetime.now(UTC).date().isoformat()
    return {
        "date": date,
        "base": to_dict(plan.base),
        "asked_count": plan.count,
        **about,
        **machine,
        "variants": found,
    }


def _results(plan: Plan, variant: Variant) -> Iterator[tuple[int, dict[str, Any]]]:
    """(seed, result) of a variant's finished runs, by seed.

    A seed that was not asked for counts if nothing but the seed tells its run from the others.
    """
    others = set()
    for folder in (plan.out / variant.name).glob("seed-*"):
        number = folder.name.removeprefix("seed-")
        if number.isdecimal() and folder.name == f"seed-{int(number)}":
            others.add(int(number))
    for seed in sorted(others | set(plan.seeds)):
        try:
            result = _result(plan.job(variant, seed))
        except InputError:
            if seed in plan.seeds:
                raise
            continue
        if result is not None:
            yield seed, result


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {usable_cores()} cores"


def _threads_each(plan: Plan) -> int:
    return max(1, usable_cores() // plan.parallel)


def _result(job: Job) -> dict[str, Any] | None:
    """What a run left, or None if it has to run.

    Raises:
        InputError: if it was another run.
    """
    file = Path(job.folder) / RESULT
    try:
        result = json.loads(file.read_bytes())
        other = differences(from_dict(job.config), from_dict(result["config"], str(file)))
    except FileNotFoundError:
        _require_own_run(job)
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not a result of an ablation; delete it, or choose another --out"
        ) from error
    _require_none_differ(other, file)
    method = from_dict(job.config).method
    if result.get("objective_revision", 1) != revision(method):
        raise InputError(
            f"{file}: made by another version, to which --method.metric {method.metric} meant another loss;"
            " choose another --out"
        )
    if result["asked_count"] != job.count:
        was, now = ("the default" if count is None else count for count in (result["asked_count"], job.count))
        raise InputError(f"{file}: made with --count {was}, now it is {now}; choose another --out")
    return result


def _require_own_run(job: Job) -> None:
    """Raises InputError if a run without a result has other settings than the job."""
    file = Path(job.folder) / RUN / "config.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be read the run itself will refuse
        begun = from_dict(json.loads(file.read_bytes()), str(file))
        _require_none_differ(differences(from_dict(job.config), begun), file)


def _require_none_differ(differing: Sequence[tuple[str, object, object]], file: Path) -> None:
    """Raises InputError naming the first of the settings in a file that are others now."""
    if differing:
        name, ours, theirs = differing[0]
        raise InputError(f"{file}: made with {name} {theirs}, now it is {ours}; choose another --out")


@dataclass
class _Running:
    variant: Variant
    seed: int
    job: Job
    process: subprocess.Popen[bytes]
    slot: int


def _run(
    plan: Plan,
    waiting: Sequence[tuple[Variant, int, Job]],
    stop: StopRequest,
    say: Callable[[str], None],
) -> int | None:
    """Keeps `plan.parallel` processes busy; None when all are done, an exit code if a signal came.

    Raises:
        InputError: at once.
        TrainingError: at the end, when the runs that can have a result have it.
    """
    queue, done = list(waiting), 0
    running: list[_Running] = []
    lost: list[TrainingError] = []
    started = last_line = time.monotonic()
    before = sum(_share_done(plan, job) for _, _, job in waiting)
    try:
        while (queue or running) and stop.exit_code is None:
            free = set(range(plan.parallel)) - {each.slot for each in running}
            while queue and free:
                running.append(_start(plan, *queue.pop(0), free.pop()))
            time.sleep(0.2)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                done += 1
                try:
                    said = f"{each.variant.label}, seed {each.seed}: {_outcome(each)}"
                except TrainingError as error:
                    lost.append(error)
                    said = str(error)
                say(f"{done} of {len(waiting)}: {said}")
            if time.monotonic() - last_line >= LINE_INTERVAL:
                last_line = time.monotonic()
                share = sum(_share_done(plan, each.job) for each in running) + done
                gained = share - before
                if running and gained > 0:
                    left = duration((last_line - started) / gained * (len(waiting) - share))
                    done_of = f"{share / len(waiting):.0%} of {len(waiting)} runs"
                    say(f"{done_of}, {len(running)} at once, ETA {left}")
    finally:
        _end(running)
    if lost and stop.exit_code is None:
        without = f"{len(lost)} of {len(waiting)} runs ended without a result"
        raise TrainingError(f"{without}; the same command makes them again; {lost[0]}")
    return stop.exit_code


def _start(plan: Plan, variant: Variant, seed: int, job: Job, slot: int) -> _Running:
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if plan.device == "cuda":
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if gpus == [""]:
            gpus = [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    else:
        environment["OMP_NUM_THREADS"] = str(_threads_each(plan))
    with (folder / OUTPUT).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ict_fast.ablation.one_run"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C is this process's, which tells the runs to save
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps(asdict(job) | {"parent": os.getpid()}).encode())
    return _Running(variant, seed, job, process, slot)


def _outcome(run: _Running) -> str:
    """What to say of a finished process.

    Raises:
        InputError, TrainingError: if it left no result.
    """
    code, output = run.process.returncode, Path(run.job.folder) / OUTPUT
    result = _result(run.job) if code == 0 else None
    if result is not None:
        if "failed" in result:
            return f"failed: {result['failed']}"
        return f"distance {result['one_step']['frechet_distance']:.2f}, {duration(result['seconds'])}"
    said = output.read_text(errors="replace").strip().splitlines() or ["nothing"]
    last = said[-1].removeprefix("ict-fast: error: ")
    error = InputError if code == 2 else TrainingError
    raise error(f"{run.variant.name}, seed {run.seed}, ended with {code}: {last} (all it said: {output})")


def _share_done(plan: Plan, job: Job) -> float:
    """How far a run is, in [0, 1), from its own log."""
    last = next(_last_lines(Path(job.folder) / RUN / LOG_NAME), None)
    step = 0
    with suppress(ValueError, TypeError, KeyError):
        step = json.loads(last or "{}").get("step", 0)
    return (1 - _EVALUATION) * step / plan.base.training.total_steps


def _last_lines(path: Path) -> Iterator[bytes]:
    with suppress(OSError):
        yield from reversed(path.read_bytes().splitlines()[-1:])


def _end(running: Sequence[_Running]) -> None:
    """Tells the runs to save and stop, and waits."""
    for each in running:
        with suppress(ProcessLookupError):
            each.process.terminate()
    for each in running:
        try:
            each.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()
