"""Triton's interpreter without half of its time.

Once a launch, not at each call of a device function, does it look through its whole language for what it
replaces; and what follows from a shape or a dtype it finds once, not for each tensor.
"""

from __future__ import annotations

import functools
import math

from triton import language
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
_replaced: set[bool] = set()  # of this launch: with triton.language, and without it


@functools.wraps(_patch)
def _patch_once(function):
    has_language = any(value is language for value in function.__globals__.values())
    if has_language not in _replaced:
        _replaced.add(has_language)
        return _patch(function)
    return None


@functools.wraps(_launch)
def _launch_anew(self, *arguments, **keywords):
    _replaced.clear()
    return _launch(self, *arguments, **keywords)


@functools.cache
def _of_shape(shape):
    return language.core.tuple([language.constexpr(each) for each in shape]), language.constexpr(
        math.prod(shape)
    )


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _of_shape(type.shape if type.is_block() else ())


_of_any = interpreter._get_np_dtype
_of_number = functools.cache(_of_any)
interpreter._get_np_dtype = lambda dtype: (_of_any if dtype.scalar.is_ptr() else _of_number)(dtype.scalar)
language.tensor.__init__ = _make_tensor
interpreter._patch_lang = _patch_once
interpreter.GridExecutor.__call__ = _launch_anew
