"""One contender at one large batch: parity with float64, device time, achieved rate, peak memory."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from contenders import SETTINGS
from gpu_contenders import CONTENDERS, OURS, TAU, Built, Case, Contender, Views, is_installed, make_views
from gpu_contenders import our_step as make_our_step
from gpu_measure import LostDevice, short
from gpu_parity import Expected, errors, failure, tolerance
from gpu_results import Results
from gpu_timing import Run, Spread, Stopwatch, spread
from torch import Tensor

import clusterns
from clusterns import functional, reference
from clusterns.options import WORKSPACE_BYTES

ROW_SECONDS = 12.0  # a row that would take longer, judged by a smaller batch, is left out
ONCE_SECONDS = 60.0  # and so is the one huge batch


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    batches: tuple[int, ...] = tuple(4096 * 2**each for each in range(7))
    dim: int = 768
    clusters: int = 128
    workspace_bytes: int = WORKSPACE_BYTES
    once: tuple[int, int] = (1_048_576, 2 * 2**30)  # rows, workspace
    crossover: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    assignment: tuple[int, int] = (1_000_000, 1024)  # points, centroids
    products: tuple[tuple[int, int, int], ...] = ((8192, 768, 65536), (8192, 8192, 8192))  # M, L, N
    backend: str = "auto"


def truth_of(case: Case, views: Views) -> Expected:
    """One step in float64 through our torch path, whose memory does not grow with B²."""
    anchors, positives = (z.detach().double().requires_grad_() for z in views[:2])
    arguments: dict = {}
    if case.kind == "step":
        centroids = views.centers.double()
        nearest = clusterns.nearest_centroids(anchors, centroids).nearest
        with torch.no_grad():
            share = SETTINGS.centroid_momentum
            moved = reference.update_centroids(centroids, anchors, nearest, share, "sum")
        found = clusterns.nearest_centroids(anchors, moved)
        arguments = {
            "centroids": moved, "cluster_ids": found.nearest, "hard_negative_ids": found.runner_up,
            "false_negatives": "bml", "bml_weight": SETTINGS.bml_weight,
            "bml_alpha": SETTINGS.bml_alpha, "bml_beta": SETTINGS.bml_beta,
        }  # fmt: skip
    loss = clusterns.info_nce(
        anchors, positives, temperature=TAU, backend="torch", workspace_bytes=8 * WORKSPACE_BYTES, **arguments
    )
    return Expected(
        loss.detach(), torch.autograd.grad(loss, (anchors, positives)), arguments.get("centroids")
    )


class LargeBench:
    """Measures one contender in one case at a time."""

    def __init__(self, results: Results, watch: Stopwatch, sizes: Sizes, deadline: float):
        self.results, self.watch, self.sizes, self.deadline = results, watch, sizes, deadline
        self.case: Case | None = None
        self.rate: float | None = None  # operations per second
        self.took: dict[tuple[str, str], tuple[int, float]] = {}  # (kind, contender): B, microseconds

    def matrix_rate(self) -> None:
        """The best rate of the bf16 products, which fractions of the rate refer to."""
        rates = {}
        for rows, length, columns in self.sizes.products:
            a = torch.randn(rows, length, device=self.watch.device, dtype=torch.bfloat16)
            b = torch.randn(length, columns, device=self.watch.device, dtype=torch.bfloat16)
            out = torch.empty(rows, columns, device=self.watch.device, dtype=torch.bfloat16)
            microseconds = spread(self.watch.samples([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)])[0])
            rates[f"({rows}x{length})·({length}x{columns})"] = (
                2e6 * rows * length * columns / microseconds.median
            )
        self.rate = max(rates.values())
        listed = ", ".join(f"{shape} {rate / 1e12:.1f} TFLOP/s" for shape, rate in rates.items())
        self.results.machine["matrix rate"] = f"bf16 torch.mm: {listed}; fractions use the largest"
        self.results.write()
        print(self.results.machine["matrix rate"])

    def start(self, case: Case) -> None:
        """Views and the truth of a case."""
        if self.case == case:
            return
        self.case = None
        self.views = self.truth = None  # type: ignore[assignment]
        self.watch.release()
        self.views: Views = make_views(case, self.watch.device)
        self.truth: Expected | None = None if case.kind == "other loss" else truth_of(case, self.views)
        self.watch.release()
        self.case = case

    def measure(self, case: Case, name: str) -> None:
        """Add the row of a contender, or why there is none."""
        contender = CONTENDERS[case.kind][name]
        base = {"contender": name, "what": "both", **case.columns()}
        reason = contender.unavailable(case) or self._too_long(case, name)
        if reason:
            status = reason if reason == "not installed" else "left out"
            self.results.add({**base, "status": status, "note": reason})
            return

        def work() -> dict:
            self.start(case)
            return self._figures(case, name, self._build(contender, case))

        self._guarded(base, work)

    def _build(self, contender: Contender, case: Case) -> Built:
        if contender.name != OURS:
            return contender.build(case, self.views)
        chosen = {"backend": self.sizes.backend, "workspace_bytes": self.sizes.workspace_bytes}
        if case.kind == "step":
            return make_our_step(case, self.views, **chosen)
        views = self.views
        return Built(lambda: clusterns.info_nce(*views[:2], temperature=TAU, **chosen), views)

    def _too_long(self, case: Case, name: str) -> str:
        before = self.took.get((case.kind, name))
        if before is None or not self.results.on_gpu:
            return ""
        expected = 5e-6 * before[1] * (case.batch / before[0]) ** 2
        left = self.deadline - time.monotonic()
        return f"would take about {expected:.0f} s" if expected > min(ROW_SECONDS, left) else ""

    def _guarded(self, base: dict, work: Callable[[], dict]) -> None:
        try:
            found = work()
        except torch.OutOfMemoryError:
            found = {"status": "out of memory"}
        except Exception as error:  # a rival that fails must not end the run
            found = {"status": "failed", "note": short(error)}
        self.results.add({**base, **found})
        if "compile" in base["contender"]:
            torch._dynamo.reset()
        try:
            self.watch.release()
            self.watch.synchronize()
        except RuntimeError as error:
            raise LostDevice(short(error)) from error

    def _figures(self, case: Case, name: str, built: Built) -> dict:
        found: dict = {}
        if self.truth is not None:
            built.reset()
            answer = built.step()
            found = errors(answer, built, self.truth)
            del answer
            problem = failure(found, tolerance(case))
            if problem:
                return {**found, "status": "parity failed", "note": problem}
            built.reset()
        times = self._times(built.step)
        self.took[case.kind, name] = case.batch, times.median
        found |= self._time_columns(times, 6 * case.batch**2 * case.dim)
        found["peak_mib"] = self.watch.peak_mib(built.step, sum(z.nbytes for z in self.views[:2]))
        mine = self.results.find(
            OURS, **{**case.columns(), "kind": "plain" if case.kind != "step" else "step"}
        )
        if name == OURS:
            found["workspace_mib"] = self.sizes.workspace_bytes / 2**20
        elif mine:
            found["ratio_device"] = times.median / mine["device_us"]
        return {**found, "status": "ok", "note": ""}

    def _times(self, run: Run) -> Spread:
        """Samples of the stopwatch; single calls where one is long, since its warm-up takes many."""
        run()
        first = self.watch.block(run, 1)
        if first < 2e4 and self.results.on_gpu:
            return spread(self.watch.samples([run])[0])
        return spread([self.watch.block(run, 1) for _ in range(3 if self.results.on_gpu else 1)])

    def _time_columns(self, times: Spread, operations: float) -> dict:
        rate = operations / times.median * 1e6
        found: dict = dict(zip(("device_us", "device_us_p20", "device_us_p80"), times, strict=True))
        found["tflops"] = rate / 1e12
        if self.rate:
            found |= {"rate_fraction": rate / self.rate, "floor_us": operations / self.rate * 1e6}
        return found

    def measure_once(self) -> None:
        """One huge batch: that it completes, its time and memory; no truth, which would take minutes."""
        batch, workspace = self.sizes.once
        case = Case("step", batch, self.sizes.dim, self.sizes.clusters)
        base = {"contender": OURS, "what": "both", **case.columns(), "workspace_mib": workspace / 2**20}
        before = self.took.get(("step", OURS))
        expected = before[1] * 1e-6 * (batch / before[0]) ** 2 if before else 0.0
        limit = min(ONCE_SECONDS, self.deadline - time.monotonic())
        if self.results.on_gpu and (before is None or expected > limit):
            self.results.skip(
                [f"once B={batch}"], f"expected {expected:.0f} s, at most {limit:.0f} s allowed"
            )
            return

        def work() -> dict:
            self.case = self.views = self.truth = None  # type: ignore[assignment]
            self.watch.release()
            views = make_views(case, self.watch.device)
            self.watch.release()
            built = make_our_step(case, views, self.sizes.backend, workspace)
            took: list[float] = []

            def once() -> None:
                took.append(self.watch.block(built.step, 1))

            peak = self.watch.peak_mib(once, sum(z.nbytes for z in views[:2]))
            if not took:  # a stopwatch that knows no memory
                once()
            found = self._time_columns(Spread(took[0], took[0], took[0]), 6 * batch**2 * case.dim)
            return {**found, "peak_mib": peak, "status": "ok", "note": "one call, not warmed up"}

        self._guarded(base, work)

    def crossover(self, batch: int) -> None:
        """The fused and the chunked regime at one batch size, whatever the choice by size would be."""
        case = Case("step", batch, self.sizes.dim, self.sizes.clusters)
        for regime, workspace in (("triton", 2**40), ("triton-chunked", self.sizes.workspace_bytes)):

            def work(regime: str = regime, workspace: int = workspace) -> dict:
                self.start(case)
                views = self.views

                def loss() -> Tensor:
                    with mock.patch.object(functional, "choose_backend", return_value=regime):
                        return clusterns.info_nce(
                            *views[:2], temperature=TAU, centroids=views.centers, false_negatives="bml",
                            bml_weight=SETTINGS.bml_weight, bml_alpha=SETTINGS.bml_alpha,
                            bml_beta=SETTINGS.bml_beta, workspace_bytes=workspace,
                        )  # fmt: skip

                built = Built(loss, views)
                times = self._times(built.step)
                return {
                    **self._time_columns(times, 6 * batch**2 * case.dim), "status": "ok", "note": "crossover",
                    "peak_mib": self.watch.peak_mib(built.step, sum(z.nbytes for z in views[:2])),
                }  # fmt: skip

            base = {"contender": OURS, "what": "both", "regime": regime, **case.columns()}
            self._guarded(base, work)

    def assignment(self) -> None:
        """Nearest centroid of many points: ours, flash-kmeans, torch in chunks."""
        count, clusters = self.sizes.assignment
        case = Case("assignment", count, self.sizes.dim, clusters)
        self.case = self.views = self.truth = None  # type: ignore[assignment]
        self.watch.release()
        points, _, centers = (z.detach() for z in make_views(case, self.watch.device))
        centers = centers.to(points.dtype)
        truth: list[Tensor] = []

        def by_torch() -> Tensor:
            unit = F.normalize(centers, dim=1).T
            return torch.cat([(chunk @ unit).argmax(dim=1) for chunk in points.split(65536)])

        ways: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: clusterns.nearest_centroids(points, centers).nearest,
            "torch in chunks": by_torch,
        }
        if is_installed("flash_kmeans") and self.results.on_gpu:
            ways["flash-kmeans"] = flash_kmeans(points, centers)
        for name, run in ways.items():

            def work(run: Callable[[], Tensor] = run) -> dict:
                ids = run().long().flatten()
                truth.append(ids)
                agree = float((ids == truth[0]).double().mean())
                times = self._times(run)
                found = self._time_columns(times, 2 * count * clusters * self.sizes.dim)
                note = f"agrees with ours on {agree:.4%} of ids; ours brings the runner-up too"
                found["peak_mib"] = self.watch.peak_mib(run, 0)
                return {**found, "status": "ok" if agree > 0.99 else "parity failed", "note": note}

            self._guarded({"contender": name, "what": "assign", **case.columns(), "K": clusters}, work)


def flash_kmeans(points: Tensor, centers: Tensor) -> Callable[[], Tensor]:
    """Its Euclidean assignment on unit rows, made beforehand: their nearest is the nearest by cosine."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    x, c = (F.normalize(z, dim=1)[None] for z in (points, centers))
    more = {}
    if "x_sq" in inspect.signature(euclid_assign_triton).parameters:
        more["x_sq"] = x.float().square().sum(dim=2)
    return lambda: euclid_assign_triton(x, c, **more)
