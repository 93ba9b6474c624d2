"""Settings of the whole suite."""

import os
from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings

from interpreter import improved

# Without a card Triton's interpreter runs the kernels. It has to be known before Triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    with nullcontext() if torch.cuda.is_available() else improved():
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# A loaded machine is slow, not wrong.
settings.register_profile("lavish_fast", deadline=None)
settings.load_profile("lavish_fast")
