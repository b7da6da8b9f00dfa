"""Runnable examples of adamr: `python -m examples.lm --help`, or examples/README.md."""

import os

# A task boundary has eigenvalue problems too small for several threads: they wait for
# each other, up to ten times as long as one thread works.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
