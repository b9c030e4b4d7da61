"""What doctor sees, on machines that are made up one part at a time."""

import importlib.machinery
import importlib.util
import sys
from types import SimpleNamespace

import pytest

from ict_fast import doctor
from ict_fast.doctor import Check


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder at the head of the import path, where packages can be made up."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def package(name, *files):
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
    ("version", "status"), [("2.13.0+cpu", "ok"), ("2.11.1", "ok"), ("2.10.0", "warn"), ("2.14.0", "warn")]
)
def test_the_version_of_torch_is_judged(monkeypatch, version, status):
    fake_torch(monkeypatch, version=version)
    assert doctor._torch_and_gpus(None)[0].status == status


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
    [(None, True, "FAIL"), (None, False, "none"), ("3.7.1", True, "ok"), ("3.10.0", True, "warn")],
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
