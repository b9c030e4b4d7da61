"""What doctor sees, on machines that are made up one part at a time."""

import importlib.machinery
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ict_fast import cli, doctor
from ict_fast.data import store as store_module
from ict_fast.data.store import write_store
from ict_fast.doctor import Check
from ict_fast.training import feeding
from ict_fast.training.feeding import Feeding, Rate


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder at the head of the import path, where packages can be made up."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def package(name, *files):
        monkeypatch.delitem(sys.modules, name, raising=False)  # a real one that another test has imported
        for file in ("__init__.py", *files):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise RuntimeError('hostile code was run')")
        importlib.invalidate_caches()
        return tmp_path / name

    return package


def fake_torch(monkeypatch, *, cuda=None, gpus=0, version="2.13.0", broken=False):
    class Sum:
        def sum(self):
            if broken:
                raise RuntimeError("CUDA error: no kernel image is available\nmore")
            return 16.0

        def __add__(self, other):
            return self

    properties = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30, major=9, minor=0)
    torch = SimpleNamespace(
        __version__=version,
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_device_properties=lambda number: properties,
        ),
        ones=lambda *size, device: Sum(),
        get_num_threads=lambda: 2,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def gpu_checks(nvidia):
    return doctor._torch_and_gpus(nvidia)[1]


def test_this_machine_passes_or_says_why():
    found = doctor.checks()
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    for name in ("ict-fast", "Python", "torch", "Triton", "DALI", "apex", "CPU", "disk", "requirements"):
        assert name in names
    assert all(check.found for check in found)
    assert all(check.advice for check in found if check.status == "FAIL")
    assert next(check for check in found if check.name == "torch").status == "ok"


def test_the_advice_is_one_line_each_and_ends_with_the_verdict():
    found = [Check("a", "ok", "x"), Check("b", "warn", "x", "do " + "y" * 200), Check("c", "FAIL", "x", "z")]
    assert doctor.advice(found).splitlines() == [
        "b: do " + "y" * 200,
        "c: z",
        "Essential and missing: c.",
    ]
    assert doctor.advice(found[:2]).endswith("This machine can train.")


# --- GPU ---------------------------------------------------------------------------------------------------


def test_no_nvidia_device_is_fine(monkeypatch):
    fake_torch(monkeypatch)
    assert [check.status for check in gpu_checks(None)] == ["none"]


@pytest.mark.parametrize(
    ("cuda", "nvidia", "advice"),
    [
        (None, "/dev/nvidia0", "CUDA build of torch"),
        ("13.0", "/dev/nvidia0", "NVIDIA driver"),
        ("13.0", "/proc/driver/nvidia", "--gpus all"),
    ],
)
def test_an_nvidia_device_that_torch_cannot_use_fails(monkeypatch, cuda, nvidia, advice):
    fake_torch(monkeypatch, cuda=cuda)
    [check] = gpu_checks(nvidia)
    assert check.status == "FAIL"
    assert nvidia in check.found
    assert advice in check.advice
    assert "--device cpu" in check.advice


def test_a_device_that_is_hidden_on_purpose_does_not_fail(monkeypatch):
    fake_torch(monkeypatch, cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [check] = gpu_checks("/dev/nvidia0")
    assert check.status == "none"
    assert "CUDA_VISIBLE_DEVICES" in check.found


def test_every_gpu_is_named(monkeypatch):
    fake_torch(monkeypatch, cuda="13.0", gpus=2)
    checks = gpu_checks("/dev/nvidia0")
    assert [check.name for check in checks] == ["GPU 0", "GPU 1"]
    assert all(check.status == "ok" and "H200, 139 GiB, compute 9.0" in check.found for check in checks)


def test_a_gpu_on_which_nothing_runs_fails(monkeypatch):
    fake_torch(monkeypatch, cuda="13.0", gpus=1, broken=True)
    [check] = gpu_checks("/dev/nvidia0")
    assert check.status == "FAIL"
    assert check.found.endswith("CUDA error: no kernel image is available")


@pytest.mark.parametrize(
    ("version", "status"), [("2.15.0+cpu", "ok"), ("2.11.1", "ok"), ("2.10.0", "warn"), ("2.16.0", "warn")]
)
def test_the_version_of_torch_is_judged(monkeypatch, version, status):
    fake_torch(monkeypatch, version=version)
    assert doctor._torch_and_gpus(None)[0].status == status


def test_it_asks_for_the_torch_that_setup_does():
    asked = re.search(r'"(torch>[^"]+)"', (Path(__file__).parents[1] / "setup.py").read_text()).group(1)
    assert f'pip install "{asked}"' == doctor._INSTALL_TORCH
    assert asked == "torch>={}.{},<{}.{}".format(*(number for version in doctor._TORCH for number in version))


def test_a_torch_that_does_not_import_fails_without_a_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    check, gpus = doctor._torch_and_gpus(None)
    assert (check.status, gpus) == ("FAIL", [])


# --- compilers, Triton -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_gpu", "status"), [(True, "FAIL"), (False, "warn")])
def test_a_missing_compiler_is_essential_with_a_gpu_only(monkeypatch, has_gpu, status):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    check = doctor._compiler(has_gpu)
    assert check.status == status
    assert "missing: C, C++" in check.found


def test_a_missing_python_header_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    check = doctor._compiler(True)
    assert check.status == "FAIL"
    assert f"missing: {tmp_path}/Python.h;" in check.found
    (tmp_path / "Python.h").touch()
    assert doctor._compiler(True).status == "ok"


@pytest.mark.parametrize(
    ("version", "has_gpu", "status"),
    [
        (None, True, "FAIL"),
        (None, False, "none"),
        ("3.7.1", True, "ok"),
        ("3.9.0", True, "ok"),
        ("3.10.0", True, "warn"),
    ],
)
def test_triton_is_judged(monkeypatch, version, has_gpu, status):
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor._triton(has_gpu).status == status


def test_a_missing_requirement_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else "1")
    check = doctor._base_requirements()
    assert (check.status, check.advice) == ("FAIL", "pip install safetensors")


# --- apex and kernels: which ones? -------------------------------------------------------------------------


def test_no_apex_gives_nvidias_build_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check = doctor.apex()
    assert check.status == "none"
    assert "github.com/NVIDIA/apex" in check.advice


def test_the_apex_of_pypi_is_told_apart_without_being_imported(site):
    folder = site("apex", "models.py", "lib/__init__.py")
    check = doctor.apex()
    assert check.status == "warn"
    assert str(folder) in check.found
    assert "Pyramid" in check.found
    assert "pip uninstall apex" in check.advice
    assert "github.com/NVIDIA/apex" in check.advice
    assert "apex" not in sys.modules


def test_nvidias_apex_is_recognised_without_being_imported(site):
    site("apex", "optimizers/__init__.py", "contrib/group_norm/__init__.py")
    check = doctor.apex()
    assert check.status == "warn"
    assert "no CUDA extension" in check.found
    site("amp_C")
    site("group_norm_cuda")
    check = doctor.apex()
    assert check.status == "ok"
    assert "fused optimizers and group norm" in check.found
    assert not {"apex", "amp_C", "group_norm_cuda"} & set(sys.modules)


def test_a_folder_of_ours_that_hides_hugging_faces_kernels_is_named(site):
    folder = site("kernels")
    check = doctor.hugging_face_kernels()
    assert check.status == "warn"
    assert str(folder / "__init__.py") in check.found


def test_a_kernels_folder_that_is_no_package_hides_nothing(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    spec = importlib.machinery.ModuleSpec("kernels", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert doctor.hugging_face_kernels().status == "none"


def test_hugging_faces_kernels_is_recognised(site, monkeypatch):
    folder = site("kernels")
    monkeypatch.setattr(doctor, "_version", lambda name: "0.9.0")
    monkeypatch.setattr(doctor, "_file_of", lambda name, file: str(folder / "__init__.py"))
    check = doctor.hugging_face_kernels()
    assert (check.status, check.found) == ("ok", "0.9.0")


def test_a_full_disk_fails(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7))
    assert doctor._disk().status == "FAIL"


# --- --data: do the loaders keep up? -----------------------------------------------------------------------


def measured(step, **loaders):
    rates = {name: Rate(rate, 96) if rate else Rate(None, reason="why not") for name, rate in loaders.items()}
    return Feeding("a store", "digits", "cpu", step, rates, "memmap")


def test_a_loader_slower_than_the_step_starves_the_device():
    found = doctor.feeding_checks(measured(Rate(1000.0, 96), dali=999.0, resident=1000.0, memmap=25e3))
    assert [(check.name, check.status, check.found) for check in found[1:]] == [
        ("training step", "ok", "digits on cpu: 1,000 images/s, 96 at a time"),
        ("loader dali", "warn", "999 images/s, 1.0 times what the step consumes"),
        ("loader resident", "ok", "1,000 images/s, 1.0 times what the step consumes"),
        ("loader memmap", "ok", "25,000 images/s, auto takes it, 25.0 times what the step consumes"),
        ("feeding", "warn", "dali would starve the device"),
    ]
    assert doctor.advice(found).splitlines()[0] == "loader dali: --data.loader memmap is the fastest here"


def test_no_loader_starves_a_slow_step():
    found = doctor.feeding_checks(measured(Rate(10.0, 96), dali=None, memmap=11.0))
    assert [(check.name, check.status) for check in found[2:]] == [
        ("loader dali", "none"),
        ("loader memmap", "ok"),
        ("feeding", "ok"),
    ]
    assert found[2].found == "why not"
    assert found[-1].found == "no loader would starve the device"


def test_without_a_step_nothing_is_claimed_of_starving():
    found = doctor.feeding_checks(measured(Rate(None, reason="it is large"), memmap=11.0))
    assert [check.status for check in found] == ["ok", "none", "ok", "none"]
    assert found[1].found == "digits on cpu: not measured here: it is large"
    assert "unknown" in found[-1].found


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which all is well, and whose measurements take no longer than their least steps."""
    monkeypatch.setattr(doctor, "checks", lambda: [Check("GPU", "ok", "seen")])
    monkeypatch.setattr(feeding, "_SECONDS", 0.0)


def test_doctor_measures_a_store(healthy, digits_store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--data", str(digits_store), "--batch", "8"]) == 0
    out = capsys.readouterr().out
    for row in ("data", "training step", "loader dali", "loader resident", "loader memmap", "feeding"):
        assert f"\u2502 {row} " in out
    assert "1,797 8x8 images of 1 channels" in out
    assert "8 at a time" in out


def refused(capsys, *words):
    assert cli.main(["doctor", *words]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error


def test_a_store_that_is_not_whole_is_refused_in_one_line(healthy, tmp_path, capsys):
    assert "there is no data here" in refused(capsys, "--data", str(tmp_path / "none"))
    images, labels = np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int64)
    store = write_store(tmp_path / "cut", images, labels, source="test", recipe="zero", classes=[])
    with (store / "images.npy").open("r+b") as file:
        file.truncate(200)
    assert "images.npy: truncated, 200 of" in refused(capsys, "--data", str(store))


def test_a_store_is_compared_with_its_checksums_when_asked(healthy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(store_module, "HASH_ALWAYS_BELOW", 0)
    images, labels = np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int64)
    store = write_store(tmp_path / "store", images, labels, source="test", recipe="zero", classes=[])
    words = ["--data", str(store), "--batch", "4"]
    assert cli.main(["doctor", "--verify", *words]) == 0
    assert "\u2502 checksums " in capsys.readouterr().out
    with (store / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    assert cli.main(["doctor", *words]) == 0
    assert "checksums" not in capsys.readouterr().out
    assert "images.npy: altered, its SHA-256 is not that of meta.json" in refused(capsys, "--verify", *words)
    assert "--verify compares the files of a store; name it with --data" in refused(capsys, "--verify")


def test_a_store_larger_than_the_memory_is_warned_of(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 10 * 2**30)
    assert doctor.memory(10 * 2**30).status == "ok"
    check = doctor.memory(15 * 2**30)
    assert (check.status, check.found) == ("warn", "10.0 GiB available, the images have 15.0 GiB")
    assert "read from the disk each time" in check.advice
    monkeypatch.setattr(doctor, "available_memory", lambda: None)
    assert doctor.memory(1).status == "none"


def test_a_preset_for_other_images_is_refused_with_the_right_one(healthy, digits_store, capsys):
    error = refused(capsys, "--data", str(digits_store), "--preset", "cifar10")
    assert "--preset is cifar10" in error
    assert error.endswith("holds 8x8 images of 1 channels; right for them: digits\n")
    assert 'did you mean "digits"?' in refused(capsys, "--data", "x", "--preset", "digts")


def test_what_is_measured_needs_data(capsys):
    assert "--preset says what --data is measured against" in refused(capsys, "--preset", "digits")
    assert "--batch says" in refused(capsys, "--batch", "8")
    assert "--batch is 0; it must be at least 1" in refused(capsys, "--data", "x", "--batch", "0")


def test_a_machine_that_cannot_train_is_not_measured(monkeypatch, digits_store, capsys):
    monkeypatch.setattr(doctor, "checks", lambda: [Check("GPU", "FAIL", "broken", "mend it")])
    monkeypatch.setattr(feeding, "measure", None)
    assert cli.main(["doctor", "--data", str(digits_store)]) == 2
    assert "Essential and missing: GPU." in capsys.readouterr().out
