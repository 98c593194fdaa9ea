"""Triton kernels and their launchers. Knows nothing of training; `clusterns.fused` calls it.

Importing this package needs neither Triton nor a GPU; `clusterns.kernels.launch` needs Triton.

    similarity.py           cosine tiles: similarity matrix, nearest and runner-up centroid
    similarity_gradient.py  its backward
    centroid_update.py      members and sums of clusters, the step of the centroids
    objective.py            masked InfoNCE and margin loss over the cosines
    gradient.py             gradients of that
    tiles.py                device code they share
    launch.py               grids, tile shapes, allocation: one function a kernel
    audit.py                compiles everything ahead of time and reads the resources
"""
