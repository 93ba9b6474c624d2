"""Triton's interpreter for tests: with the same numbers on every processor, and in three quarters of the time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import ismodule

import numpy as np
import pytest


@contextmanager
def improved() -> Iterator[None]:
    """Products are sums in float64: the interpreter's own are NumPy's, in an order that depends on the processor.

    By that order parity would hold on one machine and not on another. A kernel may make a product twice, once
    transposed, and count on the same bits, which a card gives and OpenBLAS on some processors does not.

    And each call of a device function does not put its language's functions into place again, once in a launch will do.
    """
    from triton.runtime import interpreter

    def dot(self, a, b, d, *_):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    replaced: set[tuple[str, ...]] = set()  # the languages of the launch under way
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @cache
    def languages(function):
        given = [value for value in function.__globals__.values() if ismodule(value)]
        return tuple(module.__name__ for module in (interpreter.tl, interpreter.tl.core) if module in given)

    def once(function):
        if languages(function) in replaced:
            return None
        replaced.add(languages(function))
        return replace(function)

    def launched(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
