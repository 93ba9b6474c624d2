"""Settings of the whole suite."""

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

# Without a card Triton's interpreter runs the kernels. It has to be known before Triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def products_of_no_processor():
    """The interpreter's products as sums in float64. Its own are NumPy's, in an order that depends on the processor.

    By that order parity would hold on one machine and not on another: a kernel may make a product twice, once
    transposed, and count on the same bits, which a card gives and OpenBLAS on some processors does not.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, *_):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# A loaded machine is slow, not wrong.
settings.register_profile("lavish_fast", deadline=None)
settings.load_profile("lavish_fast")
