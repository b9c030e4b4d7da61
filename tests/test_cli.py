"""The command line: what it parses, what it refuses and how, and what it hands to the packages below."""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import ict_fast
from ict_fast import __main__ as program
from ict_fast import cli, presets, torchrun
from ict_fast.cli import main
from ict_fast.config import Config, differences, to_dict
from ict_fast.data.prepare import DIGITS_FINGERPRINT
from ict_fast.errors import HungError, InputError, TrainingError

COMMANDS = tuple(cli.COMMANDS)
REPOSITORY = Path(ict_fast.__file__).parent.parent


def run(*words, **options):
    """`python -m ict_fast WORDS` in a process of its own."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "ict_fast", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )


def stand_in(monkeypatch, name, **names):
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**names))


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the trainer; holds the arguments of its calls."""
    calls = []

    def train(config, **options):
        calls.append((config, options))
        return SimpleNamespace(out=options["out"], step=3, exit_code=0, message="3 steps are done")

    stand_in(monkeypatch, "ict_fast.training.trainer", train=train)
    return calls


@pytest.fixture
def model(monkeypatch):
    """Stands in for a trained model; `model.calls` holds what was asked of it, `model.config` may be set."""
    digits = presets.get("digits")
    config = dataclasses.replace(digits, network=dataclasses.replace(digits.network, num_classes=0))
    fake = SimpleNamespace(config=config, calls=[], to=lambda device: fake)

    def sample(asked, count, **options):
        assert asked is fake
        fake.calls.append({"count": count, **options})
        network = fake.config.network
        return np.full((count, network.resolution, network.resolution, network.image_channels), 128, np.uint8)

    def evaluate(asked, reference, **options):
        assert asked is fake
        fake.calls.append({"reference": reference, **options})
        options["progress"](0.5, "half")
        return {"one_step": {"frechet_distance": 1.5}, "reference": {"noise": 100.0}}

    def open_checkpoint(path):
        made = {"reconstruction": {}} if path.name == "sigma-rel-0.15" else {}
        folder = path if made else path / "checkpoints" / "step-00000003"
        return SimpleNamespace(path=folder, step=3, state=made)

    stand_in(monkeypatch, "ict_fast.consistency", load_model=lambda path, weights: fake, sample_pixels=sample)
    stand_in(monkeypatch, "ict_fast.checkpoint", open_checkpoint=open_checkpoint)
    stand_in(
        monkeypatch,
        "ict_fast.evaluation",
        evaluate=evaluate,
        discard_work=lambda folder: shutil.rmtree(folder / "part", ignore_errors=True),
        table=lambda result: "the table",
    )
    stand_in(
        monkeypatch,
        "ict_fast.evaluation.reference",
        training_data=lambda asked: Path(asked.config.data.path),
    )
    stand_in(
        monkeypatch,
        "ict_fast.training.launch",
        resolve_device=lambda device, gpus: device,
        resolve_processes=lambda device, gpus, processes: (SimpleNamespace(type="cpu"), processes or 1),
        configure_torch=lambda device, deterministic: None,
    )
    return fake


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs" / "digits"
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    return folder


@pytest.fixture
def resumable(tmp_path):
    """A run with two checkpoints, and its configuration: no section is as the preset says."""
    preset = presets.get("cifar10")
    config = dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, path="/images", loader="memmap"),
        network=dataclasses.replace(preset.network, dropout=0.1, attention_resolutions=(16, 8)),
        method=dataclasses.replace(preset.method, huber_c=0.03, second_sigma=0.5),
        optimizer=dataclasses.replace(preset.optimizer, ema_decays=(0.9, 0.99), ema_warmup=True),
        training=dataclasses.replace(preset.training, total_steps=600),
        logging=dataclasses.replace(preset.logging, tracker="none"),
    )
    folder = tmp_path / "resumable"
    for step in (3, 6):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "config": to_dict(config)}))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder, config


def refused(capsys, *words):
    """The one line on standard error with which the program refuses WORDS."""
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("ict-fast: error: ")
    assert error.count("\n") == 1
    assert not set("╭│╰") & set(error)
    return error.removeprefix("ict-fast: error: ").rstrip("\n")


# --- it starts at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--lr", "1"],
        ["--version"],
        ["train", "--help", "--out", "resumable"],
        ["train", "--lr", "1", "--out", "resumable"],
    ],
)
def test_help_and_refusals_import_neither_torch_nor_numpy(words, resumable):
    program = (
        "import sys; from ict_fast.cli import main; main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'numpy', 'PIL', 'ict_kernels'} & set(sys.modules)))"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        cwd=resumable[0].parent,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["train", "--help"]])
def test_it_answers_in_under_a_second(words):
    """Of a processor's time, in which what else the machine does is not counted."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert run(*words).returncode == 0
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # of the processes that this one has waited for
    assert min(seconds) < 1


def test_importing_ict_fast_imports_no_torch_and_still_offers_every_name():
    program = (
        "import sys, ict_fast; assert 'torch' not in sys.modules; assert ict_fast.__version__;"
        "assert ict_fast.presets.names(); assert ict_fast.Config().preset == 'digits';"
        "assert 'torch' not in sys.modules; assert set(ict_fast._HOME) < set(dir(ict_fast));"
        "import importlib.util;"
        "assert all(importlib.util.find_spec(home) for home in ict_fast._HOME.values())"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_ict_fast_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = ict_fast.load_modle


# --- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_command(capsys, words):
    assert main(words) == 0
    out = capsys.readouterr().out
    listed = out.split("\n\n")[2].splitlines()  # a line each
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(line.startswith("  ") and line.endswith(".") for line in listed)


def test_a_complaint_is_text_that_the_terminal_does_not_obey(capsys):
    assert main(["sample", "\x1b[31mrun\x07" + "/b" * 1000]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[31mrun\x07" in error
    assert error[:-1].isprintable()
    assert error.rstrip().endswith("makes one")  # the end, which says what would be right, is still there
    assert len(error) < 1100


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Connection closed by peer"),
            r"^Traceback (?s:.*)\nRuntimeError: Connection closed by peer$",
        ),
        (HungError("process 1 gave up"), r"^ict-fast: error: process 1 gave up$"),
        (TrainingError("no gradient"), r"^ict-fast: error: no gradient$"),
    ],
)
def test_one_of_torchruns_processes_that_has_lost_another_waits_for_no_thread(
    capsys, monkeypatch, error, said
):
    def fail(argv):
        raise error

    def leave(code):
        ended.append(code)
        raise SystemExit

    ended = []
    monkeypatch.setattr(cli, "_dispatch", fail)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(torchrun, "LEAVING_SECONDS", 0.0)
    monkeypatch.setattr(
        sys, "excepthook", sys.__excepthook__
    )  # torch's, once there were processes, names them
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for others, code in (("1", []), ("2", [1])):
        monkeypatch.setenv("WORLD_SIZE", others)
        with suppress(SystemExit, RuntimeError):
            assert main(["train"]) == 1
        assert ended == code
    assert re.search(said, capsys.readouterr().err.rstrip(), re.MULTILINE)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ict-fast {ict_fast.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: ict-fast {command}" in out
    assert cli.COMMANDS[command][0].__doc__.split(".")[0] in " ".join(out.split())


def test_python_m_is_the_same_program():
    assert run("train", "--help").stdout.startswith("usage: ict-fast train")


def test_the_help_of_a_preset_shows_its_values(capsys):
    main(["train", "--help"])
    digits = " ".join(capsys.readouterr().out.split())
    main(["train", "--preset", "cifar10", "--help"])
    cifar10 = " ".join(capsys.readouterr().out.split())
    assert "(default: 400000)" in cifar10
    assert "(default: 400000)" not in digits
    assert "(default: 2 2 2)" in cifar10


def test_every_configuration_field_is_a_flag_and_preset_is_there_once(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    for section, values in to_dict(Config()).items():
        if section != "preset":
            for name in values:
                assert f"--{section}.{name}".replace("_", "-") in out
    assert out.count("--preset") == 1


# --- train -------------------------------------------------------------------------------------------------


def test_train_alone_is_the_digits_preset_in_its_own_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    expected = {
        "out": Path("runs/digits"),
        "device": "auto",
        "gpus": None,
        "processes": None,
        "resume": "auto",
        "extend": None,
        "init": None,
        "max_restarts": None,
        "collective_timeout": 600.0,
    }
    assert trained == [(presets.get("digits"), expected)]
    assert "3 steps are done" in capsys.readouterr().out


def test_train_hands_its_options_on(trained, tmp_path):
    out = tmp_path / "run"
    words = "--gpus 2 --device cuda --resume must --extend 500 --preset imagenet64 --data /images"
    words += " --max-restarts 0 --collective-timeout 90 --out"
    assert main(["train", *words.split(), str(out)]) == 0
    [(config, options)] = trained
    assert options == {
        "out": out,
        "device": "cuda",
        "gpus": 2,
        "processes": None,
        "resume": "must",
        "extend": 500,
        "init": None,
        "max_restarts": 0,
        "collective_timeout": 90.0,
    }
    preset = presets.get("imagenet64")
    assert config == dataclasses.replace(preset, data=dataclasses.replace(preset.data, path="/images"))


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--training.total-steps 200", "training.total_steps", 200),
        ("--training.total_steps=200", "training.total_steps", 200),
        ("--network.channel-mult 1 2 --training.seed 0", "network.channel_mult", (1, 2)),
        ("--network.channel_mult 1 1", "network.channel_mult", (1, 1)),
        ("--optimizer.betas 0.5 0.9", "optimizer.betas", (0.5, 0.9)),
        ("--optimizer.lr 1e-4", "optimizer.lr", 1e-4),
        ("--method.p-mean -2", "method.p_mean", -2.0),
        ("--method.huber-c 0.1", "method.huber_c", 0.1),
        ("--method.huber-c None", "method.huber_c", None),
        ("--method.metric l1", "method.metric", "l1"),
        ("--data.flip", "data.flip", True),
        ("--data.flip true", "data.flip", True),
        ("--data.flip=True --training.seed 0", "data.flip", True),
        ("--data.flip --data.no-flip", "data.flip", False),
        ("--data.flip --data.flip false", "data.flip", False),
        ("--optimizer.ema_warmup false --training.seed 0", "optimizer.ema_warmup", False),
        ("--optimizer.no-ema-warmup", "optimizer.ema_warmup", False),
        ("--data.path elsewhere", "data.path", "elsewhere"),
        ("--data elsewhere", "data.path", "elsewhere"),
        ("--data=elsewhere --data.path elsewhere", "data.path", "elsewhere"),
    ],
)
def test_a_field_is_set_by_its_flag(trained, tmp_path, words, field, value):
    assert main(["train", "--out", str(tmp_path), *words.split()]) == 0
    section, name = field.split(".")
    config = presets.get("digits")
    part = dataclasses.replace(getattr(config, section), **{name: value})
    assert trained[0][0] == dataclasses.replace(config, **{section: part})


@pytest.mark.parametrize("more", [[], ["--preset", "cifar10"], ["--extend", "800"], ["--resume", "must"]])
def test_a_run_is_resumed_by_its_folder_alone(trained, resumable, more):
    folder, config = resumable
    assert main(["train", "--out", str(folder), *more]) == 0
    assert [(config, folder)] == [(asked, options["out"]) for asked, options in trained]


def test_a_run_in_the_presets_folder_is_resumed_by_nothing(trained, resumable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, config = resumable
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs/digits")
    assert main(["train"]) == 0
    assert [(config, Path("runs/digits"))] == [(asked, options["out"]) for asked, options in trained]


def test_what_is_given_to_a_run_that_is_resumed_changes_that_alone(trained, resumable):
    folder, config = resumable
    words = ["--data", "/moved", "--training.micro-batch", "8", "--logging.log-every=7", "--data.no-flip"]
    assert main(["train", "--out", str(folder), *words]) == 0
    assert trained[0][0] == dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path="/moved", flip=False),
        training=dataclasses.replace(config.training, micro_batch=8),
        logging=dataclasses.replace(config.logging, log_every=7),
    )


def test_another_preset_than_the_runs_is_refused(trained, resumable, capsys):
    folder, _ = resumable
    assert refused(capsys, "train", "--out", str(folder), "--preset", "digits") == (
        f"--preset is digits, but the run in {folder} has the preset cifar10; without --preset it goes on,"
        " another --out starts a new run"
    )
    assert trained == []


@pytest.mark.parametrize(
    "content", ["", "[]", "3", '{"config": 3}', '{"config": {"training": {"seed": -1}}}']
)
def test_a_run_that_lost_its_configuration_has_that_of_the_newest_state_that_can_be_read(
    trained, resumable, content
):
    folder, config = resumable
    (folder / "config.json").unlink()
    states = [folder / f"checkpoints/step-{step:08d}/state.json" for step in (3, 6)]
    states[1].write_text(content)
    assert main(["train", "--out", str(folder)]) == 0
    states[0].write_text(content)
    assert main(["train", "--out", str(folder)]) == 0
    assert [asked for asked, _ in trained] == [config, presets.get("digits")]


def test_an_imported_model_is_no_run_to_resume(trained, resumable):
    folder, config = resumable
    state = folder / "checkpoints/step-00000006/state.json"
    (folder / "config.json").unlink()
    state.write_text(json.dumps({"config": to_dict(config), "imported": {}}))
    assert main(["train", "--out", str(folder), "--preset", "imagenet64"]) == 0
    assert [asked for asked, _ in trained] == [presets.get("imagenet64")]


def test_a_run_that_has_no_checkpoint_yet_begins_again_with_its_options(resumable, capsys):
    folder, config = resumable
    shutil.rmtree(folder / "checkpoints")
    assert main(["train", "--out", str(folder), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said[: said.index("\n}") + 2]) == to_dict(config)
    assert f"run: {folder} would start" in said


def test_help_and_typos_come_before_what_a_run_has_to_say(resumable, capsys):
    folder, _ = resumable
    assert main(["train", "--out", str(folder), "--preset", "digits", "--help"]) == 0
    assert "usage: ict-fast train" in capsys.readouterr().out
    assert 'there is no preset "digts"' in refused(capsys, "train", "--out", str(folder), "--preset", "digts")


def test_a_dry_run_describes_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--training.total-steps", "77"]) == 0
    said = capsys.readouterr().out
    assert '"total_steps": 77' in said
    assert "run: runs/digits would start" in said
    assert "data: data/digits would be prepared" in said
    assert main(["train", "--dry-run", "--preset", "cifar10", "--gpus", "800"]) == 0
    said = capsys.readouterr().out
    assert "device: not here: --gpus is 800" in said
    assert "data: not ready: data/cifar10: there is no data here" in said
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_gives_its_exit_code_and_message_on(monkeypatch, tmp_path, capsys):
    result = SimpleNamespace(out=tmp_path, step=3, exit_code=143, message="stopped and saved")
    stand_in(monkeypatch, "ict_fast.training.trainer", train=lambda config, **options: result)
    assert main(["train", "--out", str(tmp_path)]) == 143
    assert capsys.readouterr() == ("", "stopped and saved\n")


@pytest.mark.parametrize(
    ("fingerprint", "words", "features"),
    [
        (DIGITS_FINGERPRINT, [], ""),
        ("0" * 64, [], " --features FILE.pt"),  # grey images of 8x8, and not the digits
        ("0" * 64, ["--logging.evaluate-features", "my net.pt"], " --features 'my net.pt'"),
    ],
)
def test_what_to_type_after_training_has_the_features_that_the_images_need(
    trained, tmp_path, capsys, fingerprint, words, features
):
    checkpoint = tmp_path / "checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 3, "data_fingerprint": fingerprint}))
    assert main(["train", "--out", str(tmp_path), *words]) == 0
    then = capsys.readouterr().out.splitlines()[-1]
    evaluate = f"ict-fast evaluate {tmp_path}{features}"
    assert then == f"then: ict-fast sample {tmp_path}, {evaluate}, ict-fast report {tmp_path}"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (TrainingError("diverged"), 1, "ict-fast: error: diverged (log: {out}/log.jsonl)\n"),
        (InputError("two\nlines"), 2, "ict-fast: error: two lines\n"),
        (KeyboardInterrupt(), 130, "ict-fast: error: interrupted; nothing more was saved\n"),
    ],
)
def test_an_error_below_becomes_one_line_and_an_exit_code(monkeypatch, tmp_path, capsys, error, code, said):
    def train(config, **options):
        raise error

    stand_in(monkeypatch, "ict_fast.training.trainer", train=train)
    assert main(["train", "--out", str(tmp_path)]) == code
    assert capsys.readouterr().err == said.format(out=tmp_path)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    stand_in(monkeypatch, "ict_fast.training.trainer", train=lambda config, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--out", str(tmp_path)])


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", 'unknown command "trian"; did you mean "train"?'),
        ("zzz", f'unknown command "zzz"; choose one of: {", ".join(sorted(cli.COMMANDS))}'),
        ("--versoin", 'unknown option --versoin before a command; did you mean "--version"?'),
        ("train --preset cifr10", 'there is no preset "cifr10"; did you mean "cifar10"?'),
        ("train --preset=cifr10 --help", 'there is no preset "cifr10"; did you mean "cifar10"?'),
        ("train --preset", "--preset needs a value"),
        ("train --preset --dry-run", "--preset needs a value"),
        ("train --preset digits --preset cifar10", "--preset is given 2 times: digits, cifar10; choose one"),
        ("train --lr 3", 'unknown option --lr; did you mean "--optimizer.lr"?'),
        ("train --training.lr 3", 'unknown option --training.lr; did you mean "--optimizer.lr"?'),
        (
            "train --optimiser.name adam",
            'unknown option --optimiser.name; did you mean "--optimizer.name"?',
        ),
        ("train --steps 3", 'unknown option --steps; did you mean "--training.total-steps"?'),
        ("train --batch 3", 'unknown option --batch; did you mean "--training.batch-size"?'),
        ("train --total_steps=3", 'unknown option --total_steps; did you mean "--training.total-steps"?'),
        (
            "train --training.totl-steps 3",
            'unknown option --training.totl-steps; did you mean "--training.total-steps"?',
        ),
        ("train --out --preset digits", "--out needs a path"),
        ("train --zzz", "unknown option --zzz; `ict-fast train --help` lists them"),
        ("train digits", 'unexpected argument "digits"; `ict-fast train --help` lists the options'),
        (
            "train --data.flip perhaps",
            'unexpected argument "perhaps"; `ict-fast train --help` lists the options',
        ),
        ("train --training.total-steps abc", "--training.total-steps abc: expected an integer"),
        ("train --training.total_steps=1.5", "--training.total-steps 1.5: expected an integer"),
        ("train --training.total-steps", "--training.total-steps needs an integer"),
        ("train --training.total-steps --dry-run", "--training.total-steps needs an integer"),
        ("train --optimizer.lr fast", "--optimizer.lr fast: expected a number"),
        ("train --method.huber-c big", "--method.huber-c big: expected a number"),
        ("train --network.channel-mult 1 x --dry-run", "--network.channel-mult 1 x: expected integers"),
        ("train --optimizer.betas 0.9", "--optimizer.betas needs 2 numbers"),
        ("train --optimizer.betas 0.9 high", "--optimizer.betas 0.9 high: expected 2 numbers"),
        ("train --gpus all", "--gpus all: expected an integer"),
        ("train --gpus 0", "--gpus is 0; it must be at least 1"),
        ("train --extend 0", "--extend is 0; it must be at least 1"),
        ("train --max-restarts -1", "--max-restarts is -1; it must be at least 0"),
        ("train --collective-timeout 0", "--collective-timeout is 0; it must be 1 to 1,000,000 seconds"),
        ("train --collective-timeout nan", "--collective-timeout is nan; it must be 1 to 1,000,000 seconds"),
        ("train --data", "--data needs a path"),
        ("train --data a --data.path b", "--data is a and --data.path is b; give one of them"),
        ("train --device gpu", '--device "gpu"; did you mean "cuda"?'),
        ("train --resume maybe", '--resume "maybe"; choose one of: auto, must, never'),
        ("train --network.name adn", '--network.name "adn"; did you mean "adm"?'),
        ("train --training.batch-size 0", "--training.batch-size is 0; it must be at least 1"),
        ("sample", "ict-fast sample needs RUN|CHECKPOINT; see `ict-fast sample --help`"),
        (
            "edit inpaint {run} --mask left",
            "ict-fast edit needs --input IMAGE|FOLDER ...; see `ict-fast edit --help`",
        ),
        ("sample --cuont 3 {run}", 'unknown option --cuont; did you mean "--count"?'),
        ("sample {run} {run}", 'unexpected argument "{run}"; `ict-fast sample --help` lists the options'),
        ("sample {run} --count 0", "--count is 0; it must be at least 1"),
        ("sample {run} --count many", "--count many: expected an integer"),
        ("sample {run} --steps 0", "--steps is 0; it must be at least 1"),
        ("sample {run} --steps 100000000000", "--steps is 100000000000; it must be at most 10,000"),
        ("sample {run} --count 100000000000", "--count is 100000000000; it must be at most 1,000,000,000"),
        ("evaluate {run} --steps 1,10001", "--steps is 10001; it must be at most 10,000"),
        ("sample {run} --seed -1", "--seed is -1; it must be 0 or more and below 2^63"),
        ("sample {run} --sigmas 0.3 0.8", "--sigmas is 0.3 0.8; it must be descending and positive"),
        ("sample {run} --sigmas 0.8 -1", "--sigmas is 0.8 -1.0; it must be descending and positive"),
        ("sample {run} --sigmas nan", "--sigmas is nan; it must be descending and positive"),
        ("sample {run} --sigmas 0.8 --steps 3", "--sigmas has 1 values; --steps 3 needs 2"),
        ("evaluate {run} --sigmas 0.3 0.8", "--sigmas is 0.3 0.8; it must be descending and positive"),
        ("evaluate {run} --sigmas 0.8 --steps 3", "--sigmas has 1 values; --steps 3 needs 2"),
        (
            "evaluate {run} --sigmas 0.8 --steps 1,2",
            "--steps is 1,2; with --sigmas it must be one number, here 2",
        ),
        ("evaluate {run} --sigmas high", "--sigmas high: expected numbers"),
        ("sample {run} --labels 1 two", "--labels 1 two: expected integers"),
        ("sample {run} --labels 1 2 3 --count 2", "--labels has 3 values; --count is 2"),
        (
            "sample {run} --labels 3 99999999999999999999",
            "--labels has 99999999999999999999, which is no class; classes are counted from 0",
        ),
        ("sample {run} --out a.jpg", "--out is a.jpg; it must end with .png or .npz, or name a folder"),
        ("evaluate {run} --steps 1,x", "--steps 1,x: expected integers"),
        ("evaluate {run} --steps 0,1", "--steps is 0; it must be at least 1"),
        ("evaluate {run} --count 1", "--count is 1; it must be at least 2"),
        (
            "report {run} --out {run}",
            "--out is {run}, a folder; name a file to write, such as {run}/report.html",
        ),
        *(
            (
                f"{command} {{run}} --features-sha256 ab",
                "--features-sha256 is the SHA-256 of --features, which is not given",
            )
            for command in ("evaluate", "search-sigma")
        ),
        (
            "prepare",
            "ict-fast prepare needs digits, cifar10, imagenet, imagenet-npz, edm-zip, folder, parquet;"
            " see `ict-fast prepare --help`",
        ),
        ("prepare digit", 'ict-fast prepare "digit"; did you mean "digits"?'),
        ("doctor --fix", "unknown option --fix; `ict-fast doctor --help` lists them"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, trained, model, run_folder, words, said):
    assert refused(capsys, *words.format(run=run_folder).split()) == said.format(run=run_folder)
    assert trained == []
    assert model.calls == []


def test_an_event_that_tyro_may_add_later_is_refused_all_the_same():
    from ict_fast.errors import refusal

    event = type("NewKind", (), {"prog": "ict-fast train"})()
    assert refusal(event, {}, [], "ict-fast train") == (
        "cannot read the command line (NewKind); see `ict-fast train --help`"
    )


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_run_that_does_not_exist_is_refused_before_torch_is_loaded(tmp_path, command):
    done = run(command, "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ict-fast: error: there is no run or checkpoint at nowhere;")


@pytest.mark.parametrize(
    "words",
    [
        "train --out {file}",
        "train --out {file}/run",
        "prepare digits --out {file}",
        "sample {run} --out {file}/a.png",
    ],
)
def test_a_place_that_is_a_file_is_refused(capsys, trained, model, run_folder, tmp_path, words):
    file = tmp_path / "file"
    file.write_text("precious")
    said = refused(capsys, *words.format(file=file, run=run_folder).split())
    assert f"{file} is not a folder; choose another place" in said
    assert file.read_text() == "precious"
    assert trained == model.calls == []


@pytest.mark.parametrize(
    "words",
    [
        "train --out {place}",
        "ablate --out {place}",
        "ema {run} --decay 0.9 --out {place}",
        "import edm {run} --out {place}",
        "export safetensors {run} --out {place}",
    ],
)
def test_a_place_where_weights_could_not_be_read_is_refused(capsys, trained, run_folder, tmp_path, words):
    place = tmp_path / "caf\udce9/run"  # as Python names a folder whose name is not UTF-8
    place.parent.mkdir()
    written = place.with_name("one.safetensors")
    written.write_bytes(safetensors.torch.save({"one": torch.ones(1)}))
    with pytest.raises(safetensors.SafetensorError, match="not valid UTF-8"):
        safetensors.torch.load_file(written)
    assert refused(capsys, *words.format(place=place, run=run_folder).split()) == (
        f"--out is {tmp_path}/caf\\udce9/run, a name that is not UTF-8, and weights in such a place cannot be"
        " read again; choose another place"
    )
    assert not place.exists()
    assert trained == []


def test_a_place_that_cannot_be_written_is_refused(capsys, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    assert refused(capsys, "train", "--out", str(tmp_path / "a" / "b")) == (
        f"--out is {tmp_path}/a/b, but {tmp_path} cannot be written; choose another place"
    )
    assert trained == []


def test_a_run_is_planned_or_found_finished_where_nothing_can_be_written(
    capsys, trained, monkeypatch, tmp_path
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    assert main(["train", "--dry-run", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    assert (
        f"\nout: not here: --out is {tmp_path}/new, but {tmp_path} cannot be written;"
        in capsys.readouterr().out
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    assert main(["train", "--out", str(tmp_path / "run")]) == 0
    assert len(trained) == 1, "it may be finished"


# --- sample ------------------------------------------------------------------------------------------------


def test_samples_go_beside_the_run_as_a_grid(model, run_folder, capsys):
    assert main(["sample", str(run_folder)]) == 0
    [call] = model.calls
    assert {**call, "progress": None} == {
        "count": 64, "steps": 1, "sigmas": None, "labels": None, "seed": 0, "progress": None,
    }  # fmt: skip
    Image.open(run_folder / "samples.png").verify()
    assert capsys.readouterr().out == f"64 images in 1 step: {run_folder}/samples.png\n"


def test_one_sample_is_not_several(model, run_folder, capsys):
    assert main(["sample", str(run_folder), "--count", "1", "--steps", "2"]) == 0
    assert capsys.readouterr().out == f"1 image in 2 steps: {run_folder}/samples.png\n"


def test_samples_of_a_checkpoint_go_to_its_run(model, run_folder):
    for where in (run_folder / "checkpoints" / "step-00000003", run_folder / "checkpoints"):
        assert main(["sample", str(where)]) == 0
        (run_folder / "samples.png").unlink()


def test_sigmas_imply_the_number_of_steps(model, run_folder):
    assert main(["sample", str(run_folder), "--sigmas", "0.821"]) == 0
    assert model.calls[0]["steps"] == 2
    assert list(model.calls[0]["sigmas"]) == [0.821]


def test_options_may_come_before_the_run(model, run_folder):
    assert main(["sample", "--seed", "7", "--count", "3", "--steps", "2", str(run_folder)]) == 0
    assert (model.calls[0]["count"], model.calls[0]["steps"], model.calls[0]["seed"]) == (3, 2, 7)


def conditional(model):
    model.config = dataclasses.replace(
        model.config, network=dataclasses.replace(model.config.network, num_classes=10, image_channels=3)
    )


@pytest.mark.parametrize(
    ("words", "labels"), [([], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]), (["--labels", "3", "5"], [3, 5] * 6)]
)
def test_an_npz_holds_images_and_labels(model, run_folder, tmp_path, words, labels):
    conditional(model)
    out = tmp_path / "new" / "samples.npz"
    assert main(["sample", str(run_folder), "--count", "12", "--out", str(out), *words]) == 0
    assert list(model.calls[0]["labels"]) == labels
    with np.load(out) as arrays:
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (12, 8, 8, 3))
        assert (arrays["arr_1"].dtype, arrays["arr_1"].tolist()) == (np.int64, labels)


def test_an_unconditional_npz_has_no_labels(model, run_folder, tmp_path):
    assert main(["sample", str(run_folder), "--count", "2", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays.files == ["arr_0"]


def test_labels_for_an_unconditional_model_reach_the_function_that_refuses_them(model, run_folder):
    main(["sample", str(run_folder), "--labels", "3"])
    assert list(model.calls[0]["labels"]) == [3] * 64


def test_a_folder_gets_one_png_per_image(model, run_folder, tmp_path):
    out = tmp_path / "images"
    for _ in range(2):  # the same command again overwrites its own
        assert main(["sample", str(run_folder), "--count", "3", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(out / "000001.png").size == (8, 8)


def test_a_folder_with_other_files_is_refused(model, run_folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000003.png").touch()
    said = refused(capsys, "sample", str(run_folder), "--count", "3", "--out", str(tmp_path / "images"))
    assert "which holds 000003.png" in said


def test_a_disk_that_fails_is_bad_input_not_a_traceback(model, run_folder, monkeypatch, capsys):
    import ict_fast.data.pictures

    def save_png(image, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ict_fast.data.pictures, "save_png", save_png)
    said = refused(capsys, "sample", str(run_folder))
    assert (
        said == f"{run_folder}/samples.png cannot be written: No space left on device; choose another --out"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_memory_that_runs_out_is_one_line(model, run_folder, monkeypatch, capsys, error):
    def sample(*arguments, **options):
        raise error

    monkeypatch.setattr(sys.modules["ict_fast.consistency"], "sample_pixels", sample)
    assert main(["sample", str(run_folder)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ict-fast: error: out of memory: ")
    assert said.count("\n") == 1


def test_another_runtime_error_is_a_bug(model, run_folder, monkeypatch):
    def sample(*arguments, **options):
        raise RuntimeError("shapes")

    monkeypatch.setattr(sys.modules["ict_fast.consistency"], "sample_pixels", sample)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["sample", str(run_folder)])


def test_an_empty_argument_is_refused(capsys):
    assert refused(capsys, "train", "--out", "") == (
        "the argument after --out is empty; leave it out, or give it a value"
    )
    assert refused(capsys, "train", "--out=") == refused(capsys, "train", "--out", ""), "as of $UNSET"


def test_ctrl_c_while_the_program_is_imported_is_one_line(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "ict_fast.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ict_fast.cli")
    monkeypatch.delattr("ict_fast.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert program.main() == 130
    assert capsys.readouterr().err == "ict-fast: error: interrupted; nothing more was saved\n"


def test_a_terminal_that_knows_ascii_alone_gets_question_marks():
    encoding = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY / "kernels")}
    program = "from ict_fast import cli; cli._overview = lambda: 'Fréchet'; cli.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=encoding, capture_output=True, check=True
    )
    assert done.stdout == b"Fr?chet\n"


# --- evaluate, prepare, doctor -----------------------------------------------------------------------------


def test_evaluate_writes_its_measures_beside_the_checkpoint(model, run_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/digits").mkdir(parents=True)
    assert main(["evaluate", str(run_folder), "--count", "10", "--seed", "3"]) == 0
    [call] = model.calls
    assert call["reference"] == Path("data/digits")
    assert (call["steps"], call["count"], call["seed"]) == ((1, 2), 10, 3)
    written = run_folder / "checkpoints" / "evaluation.json"
    assert json.loads(written.read_text()) == {
        "checkpoint": "step-00000003",
        "step": 3,
        "one_step": {"frechet_distance": 1.5},
        "reference": {"noise": 100.0},
    }
    assert capsys.readouterr().out == f"the table\nwritten: {written}\n"


MEASURED = {
    "steps": [1, 2], "sigmas": None, "count": 5000, "features": {"name": "net.pt", "sha256": "ab"},
    "reference_path": "real.npz", "reference_fingerprint": "cd", "model_sha256": "ef", "checkpoint": "step-9",
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("", None),
        ("[]", None),
        ({}, None),
        ({"count": 9}, None),
        (MEASURED, None),
        (MEASURED | {"count": 4999, "steps": [2]}, None),
        (MEASURED | {"count": 5001}, "5,001 samples (now 5,000)"),
        (MEASURED | {"steps": [1, 2, 4, 8]}, "--steps 4,8 too"),
        (MEASURED | {"sigmas": [0.8]}, "other noise levels"),
        (MEASURED | {"features": {"name": "a.pt", "sha256": "a"}}, "other features (a.pt)"),
        (MEASURED | {"reference_path": "b", "reference_fingerprint": "b"}, "another reference (b)"),
        (MEASURED | {"checkpoint": "step-8", "model_sha256": "e"}, "other weights (step-8)"),
        (MEASURED | {"count": 5001, "sigmas": [0.8]}, "5,001 samples (now 5,000), other noise levels"),
    ],
)
def test_an_evaluation_says_what_is_lost_with_the_one_that_it_replaces(
    model, run_folder, monkeypatch, capsys, before, said
):
    finished = sys.modules["ict_fast.evaluation"].evaluate

    def checked(asked, reference, **options):
        options["checked"](MEASURED)
        return finished(asked, reference, **options)

    monkeypatch.setattr(sys.modules["ict_fast.evaluation"], "evaluate", checked)
    written = run_folder / "checkpoints/evaluation.json"
    written.write_text(before if isinstance(before, str) else json.dumps(before))
    assert main(["evaluate", str(run_folder), "--reference", "real"]) == 0
    warning = (
        f"ict-fast: warning: {written} was measured with {said}, and will be replaced; with --out another"
        " file it stays\n"
    )
    assert capsys.readouterr().err == ("" if said is None else warning)


@pytest.mark.parametrize("given", [None, "0.8"])
def test_a_measurement_that_does_not_say_its_noise_levels_is_at_the_methods(
    model, run_folder, monkeypatch, capsys, given
):
    now = MEASURED | {"sigmas": None if given is None else [0.8]}
    monkeypatch.setattr(
        sys.modules["ict_fast.evaluation"],
        "evaluate",
        lambda asked, reference, checked, **options: checked(now) or {},
    )
    written = run_folder / "checkpoints/evaluation.json"
    written.write_text('{"count": 9}')
    assert main(["evaluate", str(run_folder), "--reference", "real"]) == 0
    assert ("other noise levels" in capsys.readouterr().err) == (given is not None)


def test_evaluate_writes_where_it_is_told(model, run_folder, capsys, tmp_path):
    out = tmp_path / "new/result.json"
    assert main(["evaluate", str(run_folder), "--reference", "real", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["step"] == 3
    assert not (run_folder / "checkpoints/evaluation.json").exists()


def test_evaluate_of_another_average_leaves_the_runs_own_result_alone(model, run_folder, tmp_path):
    folder = run_folder / "checkpoints"
    (folder / "evaluation.json").write_text("the run's own")
    made = run_folder / "ema" / "sigma-rel-0.15"
    made.mkdir(parents=True)
    (made / "MANIFEST.json").touch()  # a checkpoint's folder, whose evaluation has its place in it
    for name in ("power-0.05", "ema-power-0.05"):
        assert main(["evaluate", str(run_folder), "--reference", "real", "--ema", name]) == 0
    assert main(["evaluate", str(made), "--reference", "real"]) == 0
    assert (folder / "evaluation.json").read_text() == "the run's own"
    assert json.loads((folder / "evaluation-power-0.05.json").read_text())["ema"] == "power-0.05"
    assert json.loads((made / "evaluation.json").read_text())["checkpoint"] == made.name
    assert len(list(run_folder.rglob("evaluation*.json"))) == 3


@pytest.mark.parametrize("command", ["evaluate", "search-sigma"])
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("real.npz", "must end with .json"),
        ("runs/digits/checkpoints/step-00000003/ema.safetensors", "must end with .json"),
        ("reference.json", "which would overwrite"),
        ("runs/../reference.json", "which would overwrite"),
        ("link.json", "which would overwrite"),
        ("features.json", "which would overwrite"),
        ("pipe.json", "a device or a pipe"),
        ("runs/digits/config.json", "a model or of a data set"),
        ("runs/digits/run.json", "a model or of a data set"),
        ("runs/digits/checkpoints/step-00000003/state.json", "a model or of a data set"),
        ("runs/digits/checkpoints/step-00000003/new.json", "a model or of a data set"),
        ("store/meta.json", "a model or of a data set"),
    ],
)
def test_a_measurement_overwrites_nothing_but_measurements(
    model, run_folder, capsys, monkeypatch, tmp_path, command, out, said
):
    checkpoint = run_folder / "checkpoints/step-00000003"
    (tmp_path / "store").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    files = [checkpoint / name for name in ("ema.safetensors", "state.json", "MANIFEST.json")]
    files += [run_folder / name for name in ("config.json", "run.json")]
    files += [tmp_path / name for name in ("real.npz", "reference.json", "features.json", "store/meta.json")]
    for file in files:
        file.write_text(f"what was in {file}")
    (tmp_path / "link.json").symlink_to("reference.json")
    monkeypatch.chdir(tmp_path)
    words = ["--reference", "link.json", "--features", "features.json", "--out", out]
    line = refused(capsys, command, "runs/digits", *words)
    assert f"--out is {out}, " in line or f"--out is {out};" in line
    assert said in line
    assert model.calls == []
    assert all(file.read_text() == f"what was in {file}" for file in files)
    assert (tmp_path / "pipe.json").is_fifo()


@pytest.mark.parametrize("words", [["--steps", "1,4"], ["--steps", "1", "4"]])
def test_evaluate_takes_a_list_of_steps(model, run_folder, words):
    assert main(["evaluate", str(run_folder), *words, "--reference", "real"]) == 0
    assert model.calls[0]["steps"] == (1, 4)
    assert model.calls[0]["reference"] == Path("real")


@pytest.mark.parametrize(
    ("words", "steps", "sigmas"),
    [("", (1, 2), None), ("--sigmas 0.8 0.3", (3,), (0.8, 0.3)), ("--sigmas 0.8 --steps 2", (2,), (0.8,))],
)
def test_evaluate_measures_the_levels_of_sigmas(model, run_folder, words, steps, sigmas):
    assert main(["evaluate", str(run_folder), "--reference", "real", *words.split()]) == 0
    assert (model.calls[0]["steps"], model.calls[0]["sigmas"]) == (steps, sigmas)


def test_evaluate_hands_its_features_and_a_device_for_each_process_on(model, run_folder, tmp_path):
    words = ["--features", "net.pt", "--features-sha256", "ab", "--allow-other-recipe", "--processes", "2"]
    assert main(["evaluate", str(run_folder), "--reference", "real", *words]) == 0
    [call] = model.calls
    assert (call["features"], call["features_sha256"]) == (Path("net.pt"), "ab")
    assert call["allow_other_recipe"] is True
    assert len(call["devices"]) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_evaluate_keeps_what_is_done_until_the_same_command_has_finished(
    model, run_folder, monkeypatch, capsys, ctrl_c, number, code
):
    finished = sys.modules["ict_fast.evaluation"].evaluate
    folders = []

    def interrupted(asked, reference, **options):
        folders.append(options["work_folder"])
        (options["work_folder"] / "part").mkdir()
        (options["work_folder"] / "part/chunk").write_text("done")
        signal.raise_signal(number)

    monkeypatch.setattr(sys.modules["ict_fast.evaluation"], "evaluate", interrupted)
    assert main(["evaluate", str(run_folder), "--reference", "real"]) == code
    assert capsys.readouterr().err == "ict-fast: interrupted; the same command continues\n"
    assert (folders[0] / "part/chunk").exists()
    assert not (run_folder / "checkpoints/evaluation.json").exists()

    monkeypatch.setattr(sys.modules["ict_fast.evaluation"], "evaluate", finished)
    assert main(["evaluate", str(run_folder), "--reference", "real"]) == 0
    assert model.calls[0]["work_folder"] == folders[0]
    assert not folders[0].exists()


def test_a_refused_evaluate_leaves_nothing(model, run_folder, monkeypatch, capsys):
    def refuse(asked, reference, **options):
        raise InputError("no")

    monkeypatch.setattr(sys.modules["ict_fast.evaluation"], "evaluate", refuse)
    assert refused(capsys, "evaluate", str(run_folder), "--reference", "real") == "no"
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step-00000003"]


def test_prepare_writes_where_it_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "digits", "--out", "x"]) == 0
    assert main(["prepare", "digits"]) == 0
    holds = "1,797 images of 8x8 grey in 10 classes: 0, 1, 2, ..."
    assert capsys.readouterr().out == f"digits: x, {holds}\ndigits: data/digits, {holds}\n"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("none", 0), ("FAIL", 2)])
def test_doctor_fails_only_for_what_is_essential(monkeypatch, capsys, status, code):
    from ict_fast import doctor

    monkeypatch.setattr(doctor, "checks", lambda: [doctor.Check("GPU", status, "seen", "do this")])
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert "GPU: do this\n" in out
    assert ("Essential and missing: GPU." in out) == (code == 2)


# --- interrupts and pipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "train --help"])
def test_a_reader_that_leaves_is_no_error(words, unbuffered):
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    program = subprocess.Popen(
        [sys.executable, "-m", "ict_fast", *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": unbuffered},
    )
    program.stdout.close()  # before a word is written
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait() == 141


def test_an_output_that_is_closed_from_the_start_is_no_error():
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = ["sh", "-c", f'"{sys.executable}" -m ict_fast --version >&-']
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_interrupt_within_executed_text_is_an_exit_code_too(tmp_path):
    """Where Python itself would end `python -m` by the signal; torch.compile executes text."""
    (tmp_path / "sitecustomize.py").write_text(
        "from ict_fast import cli\ncli._dispatch = lambda words: exec('raise KeyboardInterrupt')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = [sys.executable, "-m", "ict_fast"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "ict-fast: error: interrupted; nothing more was saved\n"


def test_a_full_disk_under_the_output_changes_no_exit_code(trained, tmp_path, monkeypatch):
    with open("/dev/full", "w") as out, open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        assert main(["train", "--out", str(tmp_path)]) == 0
        assert main(["train", "--presett", "digits"]) == 2


def test_a_reader_that_has_left_before_the_result_is_no_error_either(trained, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["train", "--out", str(tmp_path)]) == 141
    assert len(trained) == 1


def test_a_broken_pipe_of_something_else_is_a_bug(monkeypatch, tmp_path):
    def train(config, **options):
        raise BrokenPipeError("a worker has died")

    stand_in(monkeypatch, "ict_fast.training.trainer", train=train)
    with pytest.raises(BrokenPipeError, match="worker"):
        main(["train", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --no-data.flip", "unknown option --no-data.flip"),
        ("train -5", 'unexpected argument "-5"'),
        ("evaluate a -1", 'unexpected argument "-1"'),
    ],
)
def test_what_looks_like_an_option_and_is_none_is_one_line(capsys, words, said):
    assert said in refused(capsys, *words.split())


def test_an_error_of_the_system_is_one_line(capsys, tmp_path):
    assert "File name too long" in refused(capsys, "sample", str(tmp_path / ("x" * 300)))


DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_what_a_page_tells_people_to_type_is_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    typed = [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["ict-fast"]]
    for name, (options, _) in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, (options, lambda given: 0))
    # What --init names is read while the words are.
    assert [words for words in typed if "--init" not in words and main(words) != 0] == []


def test_a_new_run_can_be_like_another_one_but_for_what_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    like = dataclasses.replace(presets.get("cifar10"), preset="cifar10")
    like = dataclasses.replace(like, network=dataclasses.replace(like.network, channels=64, dropout=0.1))
    Path("one").mkdir()
    Path("one/config.json").write_text(json.dumps(to_dict(like)))

    asked: list[Config] = []
    options, _ = cli.COMMANDS["train"]
    monkeypatch.setitem(cli.COMMANDS, "train", (options, lambda given: asked.append(given.config()) or 0))
    words = ["train", "--like", "one", "--network.dropout", "0.2", "--data", "data/mine"]
    assert main([*words, "--out", "new"]) == 0
    assert [name for name, _, _ in differences(like, asked[0])] == ["network.dropout"]
    assert asked[0].data.path == "data/mine"
    for given, said in (
        (["--like", "one"], "--like one: --out must name the folder of the new run"),
        (["--like", "nowhere", "--out", "new"], "--like nowhere: there is no run"),
        (["--like", "one", "--out", "./one"], "--like one: --out names the same run, which goes on without"),
        (
            ["--like", "one", "--out", "new", "--preset", "digits"],
            "--preset is digits, and --like one a",
        ),
    ):
        assert main(["train", *given]) == 2
        assert said in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_run_that_is_like_another_goes_on_and_one_that_is_not_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def begun(folder: str, like: Config, total_steps: int = 6, **optimizer: float) -> None:
        training = dataclasses.replace(like.training, total_steps=total_steps)
        changed = dataclasses.replace(like.optimizer, **optimizer)
        Path(folder).mkdir()
        config = dataclasses.replace(like, training=training, optimizer=changed)
        (Path(folder) / "config.json").write_text(json.dumps(to_dict(config)))

    digits = presets.get("digits")
    begun("one", digits)
    begun("extended", digits, 9, lr=0.005)
    begun("logged", dataclasses.replace(digits, logging=dataclasses.replace(digits.logging, log_every=3)))
    dry = ["train", "--device", "cpu", "--dry-run"]
    command = [*dry, "--like", "one", "--optimizer.lr", "0.005", "--out", "extended"]
    assert main(command) == main([*command, "--extend", "12"]) == 0, "the command that began it"
    assert main([*dry, "--like", "one", "--out", "logged"]) == 0
    capsys.readouterr()
    for words in (dry, ["train", "--device", "cpu"]):
        line = refused(capsys, *words, "--like", "one", "--out", "extended", "--extend", "12")
        assert "the run in extended differs in optimizer.lr (there 0.005, asked 0.002); another --out" in line

    asked: list[Config] = []
    options, _ = cli.COMMANDS["train"]
    monkeypatch.setitem(cli.COMMANDS, "train", (options, lambda given: asked.append(given.config()) or 0))
    assert main(["train", "--like", "one", "--out", "logged"]) == 0
    assert asked[0].logging.log_every == 3, "how it executes is the run's own"
    begun("grown", dataclasses.replace(digits, network=dataclasses.replace(digits.network, channels=32)))
    Path("grown/init.json").touch()
    assert main(["train", "--like", "one", "--init", "gone", "--out", "grown"]) == 0
    assert asked[1].network.channels == 32, "that of what it began with"
