"""The objective for given clusters, without a B×B tensor: one sweep over chunks of rows.

In the order of reading, which is that of the imports; `clusterns.reference` and `clusterns.rules` come first:

    norms.py            dtypes, unit rows, the way back through the normalisation
    problem.py          what a batch is made of; the identities that need no product
    ranks.py            whose columns the rows meet: one process's own, all ranks', or those that go around
    torch_products.py   the three products in plain torch, on any device
    triton_products.py  the same in Triton, for batches whose cosines do not fit the workspace
    sweep.py            the loop over blocks of columns and chunks of rows
    operators.py        sweep and launchers for autograd, and as operators that `torch.compile` takes whole;
                        with them the batch whose cosines fit: four launches forward, one backward
"""
