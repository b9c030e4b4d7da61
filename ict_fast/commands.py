"""The commands of `ict-fast`, one function each: options in, exit code out.

torch is imported inside the functions only: what can be refused without it is refused at once.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ict_fast import errors, results
from ict_fast.errors import InputError, TrainingError

if TYPE_CHECKING:
    from ict_fast.cli import DoctorOptions, EvaluateOptions, PrepareOptions, SampleOptions, TrainOptions


def train(options: TrainOptions) -> int:
    """`ict-fast train`."""
    config = options.config()
    out = options.out if options.out is not None else Path("runs") / config.preset
    for name, number in (
        ("gpus", options.gpus),
        ("processes", options.processes),
        ("extend", options.extend),
    ):
        if number is not None:
            _at_least(1, name, number)
    results.require_place(out, "--out")
    arguments: dict[str, Any] = {
        name: getattr(options, name) for name in ("device", "gpus", "processes", "resume", "extend")
    }
    if options.dry_run:
        from ict_fast.training.trainer import plan

        print(plan(config, out=out, **arguments))
        return errors.EXIT_DONE

    from ict_fast.training.trainer import train as train_run

    try:
        result = train_run(config, out=out, **arguments)
    except TrainingError as error:
        raise TrainingError(f"{error} (log: {out / 'log.jsonl'})") from error
    if result.message:
        print(result.message, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code


def sample(options: SampleOptions) -> int:
    """`ict-fast sample`."""
    _at_least(1, "count", options.count)
    _seed(options.seed)
    sigmas = options.sigmas or ()
    steps = len(sigmas) + 1 if options.steps is None else options.steps
    _at_least(1, "steps", steps)
    if sigmas and len(sigmas) != steps - 1:
        raise InputError(f"--sigmas has {len(sigmas)} values; --steps {steps} needs {steps - 1}")
    if any(not later < earlier for earlier, later in itertools.pairwise((float("inf"), *sigmas, 0.0))):
        raise InputError(f"--sigmas is {' '.join(map(str, sigmas))}; it must be descending and positive")
    if options.labels and len(options.labels) > options.count:
        raise InputError(f"--labels has {len(options.labels)} values; --count is {options.count}")
    results.require_run(options.run)
    out = options.out if options.out is not None else results.run_folder(options.run) / "samples.png"
    results.require_sample_place(out, options.count)

    from ict_fast.consistency import load_model
    from ict_fast.consistency import sample as sample_images
    from ict_fast.data.pictures import to_uint8
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    model = load_model(options.run).to(device)
    num_classes = model.config.network.num_classes
    labels: list[int] | None = None
    if num_classes or options.labels:
        labels = list(itertools.islice(itertools.cycle(options.labels or range(num_classes)), options.count))
    with _live_line() as progress:
        samples = sample_images(
            model,
            options.count,
            steps=steps,
            sigmas=sigmas or None,
            labels=labels,
            seed=options.seed,
            progress=lambda done: progress(done / options.count, "sampling"),
        )
    if not bool(samples.isfinite().all()):
        raise TrainingError(f"the images of {options.run} are not finite: its training has diverged")
    results.save_samples(to_uint8(samples), labels, out)
    print(f"{options.count} images in {steps} step{'s' if steps > 1 else ''}: {out}")
    return errors.EXIT_DONE


def evaluate(options: EvaluateOptions) -> int:
    """`ict-fast evaluate`."""
    try:
        steps = tuple(int(number) for text in options.steps for number in text.split(",") if number)
    except ValueError:
        raise InputError(errors.bad_value("--steps", " ".join(options.steps), tuple[int, ...])) from None
    _at_least(1, "steps", min(steps, default=0))
    if options.count is not None:
        _at_least(2, "count", options.count)
    _seed(options.seed)
    results.require_run(options.run)

    from ict_fast.checkpoint import open_checkpoint
    from ict_fast.consistency import load_model
    from ict_fast.evaluation import evaluate as evaluate_model
    from ict_fast.evaluation import table
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    checkpoint = open_checkpoint(options.run)
    model = load_model(checkpoint.path).to(device)
    reference = options.reference or Path(model.config.data.path)
    if options.reference is None and not reference.exists():
        raise InputError(f"the run's data, {reference}, are not here; name a prepared store with --reference")
    beside = Path(checkpoint.path).parent / "evaluation.json"
    out = beside if options.out is None else options.out
    results.require_place(out.parent, "the run" if options.out is None else "--out")

    with _live_line() as progress:
        result = evaluate_model(
            model, reference, steps=steps, count=options.count, seed=options.seed, progress=progress
        )
    result = {"checkpoint": Path(checkpoint.path).name, "step": checkpoint.step, **result}
    results.write(out, (json.dumps(result, indent=2) + "\n").encode())
    _print_table(table(result))
    print(f"written: {out}")
    return errors.EXIT_DONE


def prepare(options: PrepareOptions) -> int:
    """`ict-fast prepare`."""
    from ict_fast.data.sources import catalogue

    given = {name: value for name, value in vars(options).items() if name not in ("source", "out")}
    catalogue.check_options(options.source, given)
    folder = f"imagenet{options.resolution or 64}" if options.source == "imagenet" else options.source
    out = options.out if options.out is not None else Path("data") / folder
    results.require_place(out, "--out")
    catalogue.check_place(options.source, options.path, out)

    try:
        if options.source == "digits":
            from ict_fast.data.prepare import prepare_digits

            prepare_digits(out)
        else:
            from ict_fast.data.prepare import prepare_store

            source = catalogue.open_source(options.source, given)
            max_rejected = 0.01 if options.max_rejected is None else options.max_rejected
            prepare_store(source, out, processes=options.processes, max_rejected=max_rejected)
    except KeyboardInterrupt:
        print("ict-fast: interrupted; the same command continues", file=sys.stderr)
        return errors.EXIT_SIGINT
    print(f"{options.source}: {out}, {_contents(out)}")
    return errors.EXIT_DONE


def _contents(folder: Path) -> str:
    """What a prepared store holds, so that a person sees what is missing from it."""
    from ict_fast.data.store import open_store

    store = open_store(folder)
    size, colour = store.resolution, "grey" if store.image_channels == 1 else "RGB"
    text = f"{store.num_images:,} images of {size}x{size} {colour}"
    text += f" in {store.num_classes:,} classes" if store.num_classes else " without classes"
    rejected = store.meta.get("rejected", 0)
    return text + (f"; {rejected:,} could not be used, see {folder / 'rejected.txt'}" if rejected else "")


def doctor(options: DoctorOptions) -> int:
    """`ict-fast doctor`."""
    from ict_fast.doctor import Check, advice, checks, feeding_checks, table

    for name in ("preset", "batch"):
        if options.data is None and getattr(options, name) is not None:
            raise InputError(f"--{name} says what --data is measured against; name a store with --data DIR")
    if options.batch is not None:
        _at_least(1, "batch", options.batch)
    found = checks()
    failed = any(check.status == "FAIL" for check in found)
    if options.data is not None and failed:
        found.append(Check("data", "none", f"{options.data}: not measured before this machine can train"))
    elif options.data is not None:
        from ict_fast.training.feeding import measure

        with _live_line() as progress:
            feeding = measure(options.data, options.preset, options.batch, progress=progress)
        found += feeding_checks(feeding)
    _print_table(table(found))
    print(advice(found))
    return errors.EXIT_BAD_INPUT if failed else errors.EXIT_DONE


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise InputError(f"--{name} is {value}; it must be at least {least}")


def _seed(value: int) -> None:
    if not 0 <= value < 2**63:
        raise InputError(f"--seed is {value}; it must be 0 or more and below 2^63")


@contextmanager
def _live_line() -> Iterator[Callable[[float, str], None]]:
    """A progress bar on standard error while a person is watching: called with fraction done and what."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)


def _print_table(table: Any) -> None:
    from rich.console import Console

    console = Console()
    with console.capture() as captured:  # rich exits on a broken pipe; print leaves that to main
        console.print(table)
    print(captured.get(), end="")
