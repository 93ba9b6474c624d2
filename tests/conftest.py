"""Settings of the whole suite."""

import os

import pytest
import torch
from hypothesis import settings

# Without a card Triton's interpreter runs the kernels. It has to be known before Triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# A loaded machine is slow, not wrong.
settings.register_profile("lavish_fast", deadline=None)
settings.load_profile("lavish_fast")
