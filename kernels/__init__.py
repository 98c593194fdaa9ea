"""Triton kernels and their launchers. Knows nothing of training; `clusterns.functional` chooses it.

Importing this needs neither Triton nor a GPU.
"""
