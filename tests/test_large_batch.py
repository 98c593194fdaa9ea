"""What a large batch launches and holds, at sizes no test could compute: nothing has storage here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from clusterns.kernels import launch
from clusterns.kernels.target import Target, assume
from clusterns.objective import triton_products
from clusterns.objective.problem import GPU_WORKSPACE_BYTES, Batch, Clusters, Options
from clusterns.objective.sweep import sweep

VIEWS = {"aten::alias", "aten::detach", "aten::expand", "aten::permute", "aten::select", "aten::slice"}
VIEWS |= {"aten::split", "aten::t", "aten::transpose", "aten::unsqueeze", "aten::view", "aten::unbind"}


class Watch(TorchDispatchMode):
    """Operations but for views, and bytes of the storages that are alive."""

    def __init__(self):
        super().__init__()
        self.operations, self.alive, self.peak = [], {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function._schema.name
        if name not in VIEWS:
            self.operations.append(name)
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def swept(batch, dim, monkeypatch, false_negatives="bml", dtype=torch.bfloat16, clusters=128, **more):
    """A sweep for gradients of all on an H200 that is not there: what was watched, launches by chunk."""
    chunks, true_weigh = [], triton_products.TritonProducts.weigh

    def weigh(self, columns, rows):
        chunks.append((rows, len(launches), len(watch.operations)))
        return true_weigh(self, columns, rows)

    def close(self, columns):
        chunks.append((None, len(launches), len(watch.operations)))
        return true_close(self, columns)

    true_close = triton_products.TritonProducts.close
    monkeypatch.setattr(triton_products.TritonProducts, "weigh", weigh)
    monkeypatch.setattr(triton_products.TritonProducts, "close", close)
    # One launch on a GPU, while here half precision takes wider copies.
    product = lambda *_, first: watch.operations.append("product")  # noqa: E731
    monkeypatch.setattr(triton_products, "_accumulate", product)
    x, y = (torch.empty(batch, dim, dtype=dtype, device="meta") for _ in range(2))
    ids = torch.empty(batch, dtype=torch.int64, device="meta")
    centroids = torch.empty(clusters, dim, device="meta")
    options = Options(0.0, false_negatives, workspace_bytes=GPU_WORKSPACE_BYTES, **more)
    given = Batch(x, y, None, 0.05, Clusters(ids, centroids, ids), options)
    with assume(Target("cuda", 90)), launch.recording() as launches, Watch() as watch:
        sweep(given, (True, True, False, False), "triton-chunked")
    watch.peak -= x.nbytes + y.nbytes + ids.nbytes + centroids.nbytes  # it has met them
    return watch, launches, chunks


@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_eight_launches_a_chunk(monkeypatch, false_negatives):
    watch, launches, chunks = swept(65_536, 768, monkeypatch, false_negatives)
    rows = [each.stop - each.start for each, _, _ in chunks if each is not None]
    assert sum(rows) == 65_536
    assert {count * 3 / 128 / 132 for count in rows[:-1]} == {1.0}  # every multiprocessor has a tile
    assert len(rows) == 12
    for (_, launched, operated), (_, then, after) in itertools.pairwise(chunks[1:]):
        kernels = [each.kernel.__name__ for each in launches[launched:then]]
        operations = watch.operations[operated:after]
        assert set(operations) <= {"product", "aten::new_empty"}  # the latter of sums, one
        assert len(operations) <= 3
        assert len(kernels) + operations.count("product") <= 8, kernels


@pytest.mark.parametrize("batch", [16_384, 65_536])
def test_memory_by_arithmetic(monkeypatch, batch):
    """Above inputs: the workspace, columns in one piece, float32 sums of their gradient, results, vectors."""
    dim, clusters = 768, 128
    watch, _, chunks = swept(batch, dim, monkeypatch, clusters=clusters)
    rows = chunks[0][0].stop
    mates, tiles = batch // 8, batch // 256
    a_row = 2 * (batch + clusters) + mates + 4 * (tiles + clusters // 64 + 3 * tiles) + (2 + 2 + 4) * dim + 4
    columns = 2 * (batch + clusters) * dim + 4 * batch * dim
    vectors = 16 * 8 * batch + 2 * batch * dim * 4 // 64  # and sums of unit rows
    results = 2 * 2 * batch * dim
    assert rows * a_row <= GPU_WORKSPACE_BYTES
    expected = rows * a_row + columns + results + vectors
    assert 0.95 * expected < watch.peak < 1.05 * expected
    if batch == 65_536:
        assert watch.peak - results < 1.3e9
