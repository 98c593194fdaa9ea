"""Package layout. Metadata and tool settings live in pyproject.toml.

`kernels/` sits at the top of the checkout but installs as `clusterns.kernels`: the
bare import name `kernels` belongs to another package, which transformers probes for.
"""

from setuptools import setup

ROOMS = ["corpus", "evaluation", "models", "objective", "training"]

setup(
    packages=["clusterns", *(f"clusterns.{room}" for room in ROOMS), "clusterns.kernels"],
    package_dir={"clusterns": "clusterns", "clusterns.kernels": "kernels"},
)
