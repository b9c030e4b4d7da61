"""These files run under TRITON_INTERPRET=1 alone: ../test_interpreted.py starts them."""

import pytest

from ict_kernels.triton_support import INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        raise pytest.UsageError("set TRITON_INTERPRET=1, or run tests/kernels/test_interpreted.py")
