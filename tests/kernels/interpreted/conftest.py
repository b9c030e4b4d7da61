"""These files run under TRITON_INTERPRET=1 alone: ../test_interpreted.py starts them."""

from pathlib import Path

import pytest

from ict_kernels.triton_support import INTERPRETED

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED and any(item.path.parent == FOLDER for item in items):
        raise pytest.UsageError("set TRITON_INTERPRET=1, or run tests/kernels/test_interpreted.py")
