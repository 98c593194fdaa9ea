"""Triton kernels and their launchers. Knows nothing of training; `clusterns.objective` calls it.

Importing this package needs neither Triton nor a GPU; importing any module of it but `target` needs Triton.

    similarity.py           cosine tiles: similarity matrix, nearest and runner-up centroid of a small batch
    centroid_update.py      members and sums of its clusters, the step of the centroids
    assignment.py, cluster_sums.py
                            nearest and runner-up centroid, sums of clusters, for any number of points
    objective.py            masked InfoNCE and margin loss over the cosines
    gradient.py             gradients of that
    rows.py, weights.py, margins.py
                            the same for a chunk of rows of a large batch
    tiles.py                device code they share
    cosine_launchers.py, objective_launchers.py, chunk_launchers.py
                            one function a kernel: outputs, arguments, tile shapes
    launch.py               how any kernel is launched: parameters by name, compiled kernels, a recorder
    plan.py                 what a step launches, worked out once for its shapes, in one workspace
    target.py               whether kernels can run, for what chip, in what precision
"""
