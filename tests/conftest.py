from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # the GPU tests need none
    pass
else:  # the same examples each time, however slow the machine
    settings.register_profile("fixed", derandomize=True, deadline=None)
    settings.load_profile("fixed")

# The kernels run where there is a GPU on it, elsewhere in Triton's interpreter, on CPU tensors. It must be
# chosen before the kernels are imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError, AttributeError):  # other Triton versions may have no such part
        import quick_interpreter  # noqa: F401

# Left out by `make test-fast`: files that start processes or train, test_{name}.py, and single tests.
SLOW = set(
    """audit bench bench_ablations cached captured checkpoint compile distributed docs evaluate files
    fused_module hub killed launch model_settings package report sources spherical_kmeans train
    train_distributed trackers test_known_score_of_a_test_set test_never_builds_a_square_matrix
    test_ranks_equal_one_process test_real_triplets test_resume_keeps_the_clusters""".split()
)

# Real data beside the checkout; a user's checkout has none, and the tests that need it skip.
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.path.stem.removeprefix("test_"), getattr(item, "originalname", None)} & SLOW:
            item.add_marker("slow")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder with the recorded runs and real data")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _row_cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the tests is left in the user's cache; processes that they start inherit it."""
    os.environ["CLUSTERNS_CACHE"] = str(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For models so small that two threads only wait for each other, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def no_picture():
    """Most of the time of a tiny training is its picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clusterns.train.draw_run", lambda records, path, *_: path.touch())
        yield


@pytest.fixture
def nan_filled_memory():
    """Fill all uninitialised memory with NaN, so that a cell nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def embeddings(rows: int, dim: int, *, groups: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Two views (rows, dim) of clustered points, with norms far from 1."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(groups, dim, generator=generator, dtype=torch.float64)
    points = centers[torch.randint(groups, (rows,), generator=generator)]
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    views = [
        (points + 0.7 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)) * scale
        for _ in range(2)
    ]
    return tuple(view.to(dtype).requires_grad_() for view in views)
