"""`python -m clusterns`, and `torchrun --nproc-per-node W -m clusterns train ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
