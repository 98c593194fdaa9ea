"""Triton kernels and their launchers. Knows nothing of training; `clusterns.operators` calls it.

Importing this package needs neither Triton nor a GPU; importing any module of it but `target` needs Triton.

    similarity.py           cosine tiles: similarity matrix, nearest and runner-up centroid
    similarity_gradient.py  backward of the similarity matrix
    centroid_update.py      members and sums of clusters, the step of the centroids
    objective.py            masked InfoNCE and margin loss over the cosines
    gradient.py             gradients of that
    tiles.py                device code they share
    cosine_launchers.py, objective_launchers.py
                            one function a kernel: outputs, arguments, tile shapes
    launch.py               how any kernel is launched: cache of compiled kernels, sweeps, recorder
    target.py               whether kernels can run, for what chip, in what precision
"""
