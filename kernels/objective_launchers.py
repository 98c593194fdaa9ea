"""Launchers of the objective: its value and its gradients.

Arguments are checked by the callers (`clusterns.checks`). Embeddings are (rows, D) of one dtype with a
unit column stride; every output is new unless said otherwise. No function waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradient import gradient_kernel
from .launch import LARGE_BATCH, Tiles, cdiv, launch, new_float32
from .objective import objective_kernel
from .tiles import BML, EXCLUDE, KEEP

FALSE_NEGATIVES = {"keep": KEEP.value, "exclude": EXCLUDE.value, "bml": BML.value}


class Numbers(NamedTuple):
    """Numbers of the objective: τ (or a 0-dim tensor), w, "keep", "exclude" or "bml", λ, α, β."""

    temperature: float | Tensor
    hard_negative_weight: float
    false_negatives: str
    bml_weight: float
    bml_alpha: float
    bml_beta: float

    def arguments(self) -> dict[str, Any]:
        """What both kernels take."""
        return {
            "temperature": self.temperature,
            "hard_negative_weight": float(self.hard_negative_weight),
            "bml_weight": float(self.bml_weight),
            "alpha": float(self.bml_alpha),
            "beta": float(self.bml_beta),
            "FALSE_NEGATIVES": FALSE_NEGATIVES[self.false_negatives],
        }


def evaluate(
    cosines: Tensor,
    num_negatives: int,
    counters: Tensor,
    numbers: Numbers,
    *,
    num_centroids: int = 0,
    centroid_cosines: Tensor | None = None,
    cluster_ids: Tensor | None = None,
    hard_ids: Tensor | None = None,
    nearest: Tensor | None = None,
    nearest_cosine: Tensor | None = None,
    runner_up_cosine: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms and row state of the objective over the cosines of `compare`.

    centroid_cosines (B, padded(K)) and hard_ids (B,) put the hard negatives in; cluster_ids (B,) mark false
    negatives; nearest and the cosines (B,) fill the terms about the clusters. Returns the 0-dim loss, the
    terms (8,) named by `objective.TERMS`, and (4, B) that `differentiate` needs.
    """
    rows = cosines.shape[0]
    loss, terms = new_float32(cosines), new_float32(cosines, 8)
    row_state = new_float32(cosines, 4, rows)
    launch(
        objective_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]),),
        Tiles({"BLOCK_M": 4, "BLOCK_N": 256}, num_warps=8, num_stages=1),
        cosines=cosines,
        centroid_cosines=centroid_cosines,
        cluster_ids=cluster_ids,
        hard_ids=hard_ids,
        counters=counters,
        nearest=nearest,
        nearest_cosine=nearest_cosine,
        runner_up_cosine=runner_up_cosine,
        row_state=row_state,
        row_terms=new_float32(cosines, 8, rows),
        loss=loss,
        terms=terms,
        **numbers.arguments(),
        num_rows=rows,
        num_negatives=num_negatives,
        num_centroids=num_centroids,
        cosine_blocks=cosines.shape[1] // 16,
        centroid_blocks=centroid_cosines.shape[1] // 16 if centroid_cosines is not None else 0,
        HAS_NEGATIVES=num_negatives > 0,
    )
    return loss, terms, row_state


def differentiate(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    cosines: Tensor,
    x_inverse: Tensor,
    y_inverse: Tensor,
    row_state: Tensor,
    counters: Tensor,
    numbers: Numbers,
    needs: tuple[bool, bool, bool],
    *,
    centroids: Tensor | None = None,
    centroid_cosines: Tensor | None = None,
    centroid_inverse: Tensor | None = None,
    cluster_ids: Tensor | None = None,
    hard_ids: Tensor | None = None,
    num_centroids: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `evaluate`'s loss times `upstream` (0-dim), in the order of `needs`.

    The other arguments are what `compare`, `assign` and `evaluate` returned. Contiguous, in x's dtype.
    """
    dim, inputs = x.shape[1], (x, y, negatives)
    gradients = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need and z is not None else None
        for need, z in zip(needs, inputs, strict=True)
    ]
    counts = [out.shape[0] for out in gradients if out is not None]
    if not counts:
        return None, None, None
    if not needs[0]:  # the centroids pull on the anchors alone
        hard_ids = centroid_cosines = None
    launch(
        gradient_kernel,
        lambda block: (sum(cdiv(count, block["BLOCK_M"]) for count in counts) * cdiv(dim, block["BLOCK_D"]),),
        _gradient_tiles(x),
        x=x,
        y=y,
        negatives=negatives,
        centroids=centroids if hard_ids is not None else None,
        x_gradient=gradients[0],
        y_gradient=gradients[1] if gradients[1] is not None else gradients[2],
        negatives_gradient=gradients[2],
        cosines=cosines,
        centroid_cosines=centroid_cosines,
        x_inverse=x_inverse,
        y_inverse=y_inverse,
        centroid_inverse=centroid_inverse if hard_ids is not None else None,
        row_state=row_state,
        cluster_ids=cluster_ids,
        hard_ids=hard_ids,
        counters=counters,
        upstream=upstream,
        **numbers.arguments(),
        num_rows=x.shape[0],
        num_negatives=negatives.shape[0] if negatives is not None else 0,
        num_centroids=num_centroids,
        dim=dim,
        cosine_blocks=cosines.shape[1] // 16,
        centroid_blocks=centroid_cosines.shape[1] // 16 if centroid_cosines is not None else 0,
        NEED_Y=gradients[1] is not None,
        FLOAT16=x.dtype == torch.float16,
    )
    return gradients[0], gradients[1], gradients[2]


def _gradient_tiles(x: Tensor) -> Tiles:
    if x.dtype.itemsize == 2:
        if x.shape[0] < LARGE_BATCH:
            return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8)
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128}, num_warps=8, num_stages=2)
    return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64}, num_warps=8)
