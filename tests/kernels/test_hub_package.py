"""The kernel hub's layout, loaded from a local folder by Hugging Face's client in a process of its own."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels/hub/package.py"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "ict-kernels"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(folder)], check=True, capture_output=True)
    return folder


def run(code: str, folder: Path, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints, away from the checkout, whose kernels/ is no package, and offline."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_the_layout_is_a_project_of_kernel_builder(hub):
    build = tomllib.loads((hub / "build.toml").read_text())
    assert build["general"]["edition"] == 5
    assert build["general"]["backends"] == ["cpu", "cuda"]
    assert build["torch-noarch"] == {}
    sources = hub / "torch-ext/ict_kernels"
    assert (sources / "adapters/ect.py").exists()
    assert not (sources / "_ops.py").exists()  # the builder writes it
    for source in sources.rglob("*.py"):
        assert '"ict_kernels::' not in source.read_text()  # op names come from that file alone


def test_both_variants_hold_the_package_and_their_metadata(hub):
    package = ROOT / "kernels/ict_kernels"
    names = {path.relative_to(package) for path in package.rglob("*.py")}
    identifiers = set()
    for variant in ("torch-cpu", "torch-cuda"):
        folder = hub / "build" / variant
        for name in names:
            assert (folder / name).read_bytes() == (package / name).read_bytes()
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": variant.removeprefix("torch-")}
        assert (metadata["name"], metadata["python-depends"]) == ("ict-kernels", [])
        assert metadata["id"].isidentifier()
        identifiers.add(metadata["id"])
    assert len(identifiers) == 2


DIGEST = """
import sys, json
from pathlib import Path
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
print(sorted(str(backend) for backend in Build.open(sys.argv[1]).general.backends))
for folder in (Path(sys.argv[1]) / "build").iterdir():
    metadata = Metadata.read_from_file(folder / "metadata.json")
    theirs = Digest.hash_variant(DigestAlgorithm.SHA256, folder).files
    assert theirs == json.loads((folder / "metadata.json").read_text())["digest"]["files"]
    print(metadata.name, metadata.version, metadata.license)
"""


def test_their_parsers_take_build_file_and_metadata_and_compute_the_same_digests(hub, tmp_path):
    pytest.importorskip("kernels")
    backends, *variants = run(DIGEST, tmp_path, str(hub)).splitlines()
    assert backends == "['cpu', 'cuda']"
    assert variants == ["ict-kernels 0 Apache-2.0"] * 2


LOAD = """
import sys, torch
from pathlib import Path
import ict_kernels as installed  # both in one process
from kernels import get_kernel, get_local_kernel
hub = get_local_kernel(Path(sys.argv[1]))
assert hub is not installed
assert get_kernel("somebody/ict-kernels", version=0).__file__ == hub.__file__
x, y, weight = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.rand(3)
assert torch.equal(hub.pseudo_huber_loss(x, y, weight), installed.pseudo_huber_loss(x, y, weight))
assert set(hub.__all__) == set(installed.__all__)
assert hub.adapters.ect.ECMLoss is not installed.adapters.ect.ECMLoss
assert hasattr(getattr(torch.ops, hub._ops.NAMESPACE), "philox_words")
print(Path(hub.__file__).parent.name, hub.__name__)
"""


def test_their_client_loads_it_from_the_folder_and_by_local_kernels(hub, tmp_path):
    pytest.importorskip("kernels")
    variant, name = run(LOAD, tmp_path, str(hub), LOCAL_KERNELS=f"somebody/ict-kernels={hub}").split()
    assert variant == ("torch-cpu" if torch.version.cuda is None else "torch-cuda")
    assert name == json.loads((hub / "build" / variant / "metadata.json").read_text())["id"]


LAYERS = """
import sys, torch
from pathlib import Path
from torch import nn
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
from kernels import replace_kernel_forward_from_hub

@use_kernel_forward_from_hub("GroupNormSiLU")
class NormAct(nn.GroupNorm):
    def forward(self, x):
        return nn.functional.silu(super().forward(x))

replace_kernel_forward_from_hub(nn.GroupNorm, "GroupNorm")
torch.manual_seed(0)
model = nn.Sequential(NormAct(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4, eps=1e-3))
for parameter in model.parameters():
    nn.init.normal_(parameter)
x = torch.randn(2, 4, 5, 5)
expected = model(x)
gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
layers = {
    name: {"cpu": LocalLayerRepository(Path(sys.argv[1]), layer_name=name)}
    for name in ("GroupNormSiLU", "GroupNorm")
}
with use_kernel_mapping(layers, inherit_mapping=False):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
assert all("group_norm_silu" in model[i].forward.__code__.co_names for i in (0, 2))
torch.testing.assert_close(model(x), expected)
ours = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
for a, b in zip(ours, gradients):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), expected)
print("equal")
"""


def test_its_layers_go_into_a_model_by_kernelize(hub, tmp_path):
    pytest.importorskip("kernels")
    assert run(LAYERS, tmp_path, str(hub)) == "equal"


OLDER = """
import sys
sys.path.insert(0, sys.argv[1])
import ict_kernels
assert "build" in ict_kernels.__file__
print(float(ict_kernels.pseudo_huber_loss.__module__.split(".")[0] == sys.argv[2]))
"""


def test_older_clients_find_the_package_inside_the_variant(hub, tmp_path):
    folder = hub / "build/torch-cpu"
    identifier = json.loads((folder / "metadata.json").read_text())["id"]
    assert run(OLDER, tmp_path, str(folder), identifier) == "1.0"


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "exists and is not empty; name a new folder" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
