"""kernels/README.md: its Python runs, and what its diffs import exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "kernels/README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[2])
def test_its_python_runs(code, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_what_its_diffs_add_exists():
    added = [line[1:].strip() for block in blocks("diff") for line in block.splitlines() if line[0] == "+"]
    imports = [line for line in added if re.match(r"from ict_kernels\S* import", line)]
    assert len(imports) >= 7
    for line in imports:
        exec(line, {})
    named = set(re.findall(r"'(ict_kernels\.adapters\.\w+)\.(\w+)'", "\n".join(added)))
    assert named == {("ict_kernels.adapters.ect", "ECMLoss")}


def test_a_diff_imports_the_module_that_it_looks_itself_up_in():
    """None of the scripts imports sys."""
    looked_up = [block for block in blocks("diff") if "sys.modules" in block]
    assert len(looked_up) == 2
    assert all("+import sys\n" in block for block in looked_up)


def test_every_code_base_has_a_diff_of_its_own():
    for section in re.findall(r"\]\(#([^)]+)\)", GUIDE):
        heading = next(
            line for line in GUIDE.splitlines() if line.startswith("## ") and anchor(line[3:]) == section
        )
        body = GUIDE.split(heading + "\n")[1].split("\n## ")[0]
        assert "```diff\n" in body, section


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
