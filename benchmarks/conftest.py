"""`pytest benchmarks/`: the cases of `python -m benchmarks run`, timed by pytest-benchmark."""

from importlib.util import find_spec

import pytest

if find_spec("pytest_benchmark") is None:
    raise pytest.UsageError("pytest-benchmark is missing: pip install -e '.[benchmarks]'")
