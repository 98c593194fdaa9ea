"""Every launch that the library makes, recorded on tensors without storage, for the audit."""

from __future__ import annotations

from typing import Any

import torch

from clusterns.kernels import chunk_launchers, cosine_launchers, launch, objective_launchers


def record(dtype: torch.dtype, dim: int, batch: int) -> dict[str, launch.Launch]:
    """Every launch that the library makes at this size, by a label."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    clusters, explicit = 128, 96
    x, y, n = meta(batch, dim), meta(batch, dim), meta(explicit, dim)
    c, tau = meta(clusters, dim, dtype=torch.float32), meta(dtype=torch.float32)
    counters = meta(cosine_launchers.num_counters(batch, clusters), dtype=torch.int32)
    found: dict[str, launch.Launch] = {}

    def keep(label: str, launches: list[launch.Launch]) -> None:
        assert len(launches) == 1, label
        found[label] = launches[0]

    with launch.recording() as recorded:

        def run(label: str, function: Any, *arguments: Any, **more: Any) -> Any:
            recorded.clear()
            result = function(*arguments, **more)
            keep(label, recorded)
            return result

        plain = run("cosines, plain", cosine_launchers.compare, x, y, counters=counters)
        full = run("cosines, negatives, clusters", cosine_launchers.compare, x, y, n, c, counters)
        run("cosines, clusters", cosine_launchers.compare, x, y, None, c, counters)
        run("similarity, learned temperature", cosine_launchers.compare, x, y, temperature=tau)
        for statistic in ("sum", "mean", "sums"):
            best = (
                full[3:]
                if statistic != "sums"
                else (meta(1, 1, batch, dtype=torch.float32), meta(1, 1, batch, dtype=torch.int64))
            )
            run(f"update, {statistic}", cosine_launchers.update, x, full[1], *best, c, statistic, 0.5)
        assigned = run("assignment", cosine_launchers.assign, x, c, counters, keep_cosines=True)
        run("assignment, ids alone", cosine_launchers.assign, x, c, counters, count_uses=False)
        upstream = meta(batch, batch, dtype=torch.float32)
        run(
            "similarity, backward", cosine_launchers.differentiate_similarity,
            upstream, x, y, *plain[:3], 0.05, (True, True),
        )  # fmt: skip

        ids, hard = assigned.nearest, assigned.runner_up
        cosines = {"num_centroids": clusters, "centroid_cosines": assigned.cosines}
        cosines |= {"hard_ids": hard, "cluster_ids": ids}
        metrics = {"nearest": ids, "nearest_cosine": assigned.nearest_cosine}
        metrics |= {"runner_up_cosine": assigned.runner_up_cosine}
        state = meta(4, batch, dtype=torch.float32)
        one = meta(dtype=torch.float32)
        for mode, explicit_count in (("bml", explicit), ("bml", 0), ("exclude", explicit), ("keep", 0)):
            temperature = tau if explicit_count else 0.05
            numbers = objective_launchers.Numbers(temperature, 0.0, 1e-4, 0.2, 0.5, mode)
            s, x_inverse, y_inverse = (full if explicit_count else plain)[:3]
            label = f"{mode}{', negatives, learned temperature' if explicit_count else ''}"
            run(
                f"objective, {label}", objective_launchers.evaluate,
                s, explicit_count, counters, numbers, **cosines, **metrics,
            )  # fmt: skip
            run(
                f"gradients, {label}", objective_launchers.differentiate,
                one, x, y, n if explicit_count else None, s, x_inverse, y_inverse, state, counters, numbers,
                (True, True, True), centroids=c, centroid_inverse=assigned.centroid_inverse, **cosines,
            )  # fmt: skip
        numbers = objective_launchers.Numbers(0.05, 0.0, 0.0, 0.0, 0.0, "keep")
        run("objective, plain", objective_launchers.evaluate, plain[0], 0, counters, numbers)
        run(
            "gradients, plain", objective_launchers.differentiate,
            one, x, y, None, *plain[:3], state, counters, numbers, (True, True, False),
        )  # fmt: skip
        _record_chunk(run, meta, x, y, n, c, tau)
    return found


def _record_chunk(run: Any, meta: Any, x: Any, y: Any, n: Any, c: Any, tau: Any) -> None:
    """The launches of one chunk of a large batch."""
    rows, dim = x.shape
    number = {"dtype": torch.float32}
    inverse, ids = meta(rows, **number), meta(rows, dtype=torch.int64)
    half = x.dtype.itemsize == 2
    weights_dtype = torch.bfloat16 if half else torch.float32

    def weigh(label: str, mode: str, columns: Any, temperature: Any, **more: Any) -> None:
        count = columns.shape[0]
        partial = meta(chunk_launchers.column_tiles(columns, x), rows, **number)
        dtype = torch.float32 if columns is c else weights_dtype
        weights = meta(rows, launch.padded(count), dtype=dtype) if mode == "weights" else None
        run(
            f"{mode}, {label}", chunk_launchers.weigh,
            mode, x, columns, inverse, meta(count, **number), temperature, partial, weights, **more,
        )  # fmt: skip

    weigh("positives", "weights", y, 0.05, own=ids)
    weigh(
        "positives, exclude, reference", "weights", y, tau, own=ids, cluster_ids=(ids, ids), reference=inverse
    )
    weigh("negatives", "weights", n, 0.05)
    hard = {"uses": meta(c.shape[0], **number), "hard_ids": ids}
    weigh("centroids", "weights", c, 0.05, **hard)
    weigh("positives", "totals", y, 0.05, own=ids)
    weigh("positives, learned temperature", "maxima", y, tau, own=ids)
    margins = (x, y, inverse, inverse)
    out = meta(rows, dim, **number)
    run(
        "margins, rows", chunk_launchers.add_margins,
        *margins, None, ids, (ids, ids), ids, inverse, (0.2, 0.5), values=(inverse, inverse), out=out,
    )  # fmt: skip
    run(
        "margins, values", chunk_launchers.add_margins,
        *margins, None, ids, (ids, ids), ids, inverse, (0.2, 0.5), values=(inverse, inverse),
    )  # fmt: skip
    run(
        "margins, columns", chunk_launchers.add_margins,
        *margins, ids, ids, (ids, ids), ids, inverse, (0.2, 0.5), out=out, transposed=True,
    )  # fmt: skip
    run("through norm", chunk_launchers.through_norm, out, x, inverse, meta(rows, dim), ids)
    run("through norm, scaled", chunk_launchers.through_norm, out, x, inverse, meta(rows, dim), scaled=True)
