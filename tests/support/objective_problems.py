"""Problems for the Triton path of the objective, its gradients, and how far they are from the truth."""

from __future__ import annotations

import torch
from compare import assert_close_to_truth
from conftest import DEVICE, embeddings

from clusterns import ClusterNSLoss, nearest_centroids
from clusterns.functional import objective
from clusterns.objective.problem import Batch, Clusters, Options

OPTIONS = {"bml_weight": 0.3, "bml_alpha": 0.1, "bml_beta": 0.3}


def problem(batch=33, dim=17, clusters=5, negatives=0, dtype=torch.float32, seed=0):
    def rows(count, seed):
        return embeddings(count, dim, dtype=torch.float64, seed=seed)

    def leaf(z):
        return z.detach().to(DEVICE, dtype).requires_grad_()

    anchors, positives = map(leaf, rows(batch, seed))
    arguments = dict(OPTIONS)
    if clusters:
        arguments["centroids"] = leaf(rows(clusters, seed + 1)[0]).detach()
    if negatives:
        arguments["negatives"] = leaf(rows(negatives, seed + 2)[0])
    return anchors, positives, arguments


def fix_clusters(anchors, arguments):
    """Take the clusters from float64, so that both sides see the same where rounding would decide."""
    if "centroids" in arguments:
        found = nearest_centroids(anchors.detach().double().cpu(), arguments["centroids"].double().cpu())
        arguments["cluster_ids"] = found.nearest.to(DEVICE)
        if len(arguments["centroids"]) > 1:
            arguments["hard_negative_ids"] = found.runner_up.to(DEVICE)


def widen(arguments):
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def terms_of(anchors, positives, *, backend="auto", negatives=None, temperature=0.05, **arguments):
    """`objective` for the arguments of `info_nce`."""
    clusters = Clusters(
        *(arguments.pop(name, None) for name in ("cluster_ids", "centroids", "hard_negative_ids"))
    )
    return objective(
        Batch(anchors, positives, negatives, temperature, clusters, Options(**arguments)), backend
    )


def gradients(anchors, positives, arguments, upstream=1.0, **more):
    wanted = [anchors, positives]
    wanted += [value for value in arguments.values() if torch.is_tensor(value) and value.requires_grad]
    terms = terms_of(anchors, positives, **arguments, **more)
    return terms, torch.autograd.grad(terms.loss * upstream, wanted)


def exact(anchors, positives, arguments, upstream=1.0, **more):
    """The same in float64 by the reference."""
    views = [z.detach().double().requires_grad_() for z in (anchors, positives)]
    return gradients(*views, widen(arguments), upstream, backend="reference", **more)


def errors(run, truth):
    """Relative errors: each term (absolute below 1), then each gradient by its norm."""
    terms = [
        (one.detach().double() - other.detach()).abs() / other.detach().abs().clamp_min(1)
        for one, other in zip(run[0][:5], truth[0][:5], strict=True)  # the rest is not of every backend
    ]
    grads = [
        (one.double() - other).norm() / other.norm().clamp_min(1e-9)
        for one, other in zip(run[1], truth[1], strict=True)
    ]
    return torch.stack([e.cpu() for e in (*terms, *grads)])


def assert_exact(run, truth, temperature=0.05, condition=4.0, rounding=0.0):
    """Terms and gradients are as near the truth as the rounding of a logit 1/τ lets them be.

    rounding: what the weights of a path add, a share of a gradient. `condition` is for what amplifies more.
    """
    condition += 1 / float(temperature)
    for name, one, other in zip(run[0]._fields[:5], run[0], truth[0], strict=False):
        assert_close_to_truth(one, other, condition=condition, least=1.0, what=name)
    for place, (one, other) in enumerate(zip(run[1], truth[1], strict=True)):
        more = {"least": 1e-6, "rounding": rounding, "dtype": run[0].loss.dtype, "what": f"gradient {place}"}
        assert_close_to_truth(one, other, condition=condition, **more)


def eager_half(anchors, positives, temperature):
    """Plain InfoNCE the way plain torch does it in half precision."""
    a, p = (torch.nn.functional.normalize(z, dim=1) for z in (anchors, positives))
    return torch.nn.functional.cross_entropy(a @ p.T / temperature, torch.arange(len(a), device=a.device))


def started(update="sum", clusters=6, dim=12, seed=99, **arguments):
    loss_fn = ClusterNSLoss(
        dim, clusters, start_cosine=1.0, centroid_update=update, backend="triton", **arguments
    ).to(DEVICE)
    loss_fn(*(z.detach() for z in problem(40, dim, 0, seed=seed)[:2]))
    assert loss_fn.clustering_active
    return loss_fn
