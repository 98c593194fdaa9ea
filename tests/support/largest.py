"""The largest tensor that a piece of code makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Notes in `seen` the most that `measure`, by default bytes, says of a result that is no view."""

    def __init__(self, measure: Callable[[torch.Tensor], int] = lambda z: z.untyped_storage().nbytes()):
        super().__init__()
        self.measure, self.seen = measure, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {z.untyped_storage().data_ptr() for z in tree_leaves((args, kwargs)) if torch.is_tensor(z)}
        for z in tree_leaves(result):
            if torch.is_tensor(z) and z.untyped_storage().data_ptr() not in inputs:
                self.seen = max(self.seen, self.measure(z))
        return result
