"""The package alone: what importing it costs and brings, without Triton, and copied into another project."""

import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from ict_kernels import _ops

PACKAGE = Path(__file__).parents[2] / "kernels/ict_kernels"
SHARE = 0.3  # of torch's own time


def run(code: str, folder: Path, *arguments: str) -> str:
    """What a fresh interpreter prints; its working directory, not the checkout, is on its path."""
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another project with a copy of the folder in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("trainer", "trainer/third_party"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    shutil.copytree(
        PACKAGE, folder / "trainer/third_party/ict_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def test_importing_brings_torch_and_triton_and_nothing_else(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import ict_kernels
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    brought = run(code, tmp_path).split()
    assert {name for name in brought if not name.startswith("_sysconfigdata")} <= {"ict_kernels", "triton"}


def test_importing_costs_little_over_torchs_own(tmp_path):
    """In processor time of one process: a busy machine takes more of it for both."""
    code = """
import time
start = time.process_time()
import torch
between = time.process_time()
import ict_kernels
print((time.process_time() - between) / (between - start))
"""
    assert statistics.median(float(run(code, tmp_path)) for _ in range(3)) <= SHARE


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch, ict_kernels as ik
from ict_kernels.adapters import ect
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Conv2d(4, 4, 1))
ik.GroupNormSiLU.replace_in(net)
loss = ect.ECMLoss(c=0.03)(lambda x, sigma, labels: net(x) + x, torch.randn(3, 4, 5, 5))
loss.mean().backward()
optimizer = ik.RAdamEMA(net.parameters(), lr=1e-3)
optimizer.step()
print(all(bool(p.grad.isfinite().all()) for p in net.parameters()))
try:
    ik.set_backend("triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_everything_runs_in_pytorch(tmp_path):
    first, second = run(WITHOUT_TRITON, tmp_path).splitlines()
    assert first == "True"
    assert second.startswith("Triton cannot be imported")


BOTH = """
import torch
import ict_kernels as installed
from trainer.third_party import ict_kernels as vendored
from trainer.third_party.ict_kernels.adapters import kinyugo, openai_cm
from trainer.third_party.ict_kernels.triton_support import MISSING
assert vendored is not installed and "third_party" in vendored.__file__, vendored.__file__
x, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
for _ in range(2):  # neither has taken the other's ops away
    for a, b in ((installed, vendored), (vendored, installed)):
        assert torch.equal(a.pseudo_huber_loss(x, y), b.pseudo_huber_loss(x, y))
        mine, theirs = (each.sample_noise_levels(4, 11, seed=1).index for each in (a, b))
        assert torch.equal(mine, theirs)
        seed = torch.tensor([1, 2])
        mask = torch.compile(lambda s: a.philox.dropout_keep_mask(x.shape, 0.3, s), backend="aot_eager")
        assert torch.equal(mask(seed), b.philox.dropout_keep_mask(x, 0.3, seed))
        torch._dynamo.reset()
for each in (installed, vendored):
    name = each._ops.NAMESPACE
    print(name.removesuffix(name[-8:]), hasattr(getattr(torch.ops, name), "philox_words"))
"""


def test_a_copied_folder_and_the_installed_package_live_in_one_process(project):
    assert run(BOTH, project) == "ict_kernels_ True\ntrainer_third_party_ict_kernels_ True"


def test_a_copy_whose_code_differs_has_ops_of_other_names(tmp_path):
    """torch's caches on disk know them by name: the gradient of another version must not be found there."""
    shutil.copytree(PACKAGE, tmp_path / "same")
    shutil.copytree(PACKAGE, tmp_path / "other")
    with open(tmp_path / "other/group_norm_silu.py", "a") as file:
        file.write("\n")
    here, same, other = (
        runpy.run_path(str(folder / "_ops.py"))["NAMESPACE"]
        for folder in (PACKAGE, tmp_path / "same", tmp_path / "other")
    )
    assert here == same == _ops.NAMESPACE
    assert other != here


AGAIN = """
import sys, torch
for _ in range(2):
    for name in [each for each in sys.modules if each.split(".")[0] == "ict_kernels"]:
        del sys.modules[name]
    import ict_kernels
    print(float(ict_kernels.pseudo_huber_loss(torch.ones(1, 4), torch.zeros(1, 4), c=0.0)))
"""


def test_registering_the_ops_of_one_name_twice_does_not_fail(tmp_path):
    assert run(AGAIN, tmp_path).split() == ["2.0", "2.0"]
