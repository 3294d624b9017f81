"""The door through which SGLang finds this package."""

from __future__ import annotations


def register() -> None:
    """Change nothing: support for SGLang arrives in a later version of this package.

    SGLang calls this in each of its processes, in no promised order, before CUDA is used. It adds no
    flag, so ``--weight-sync`` stays an unknown argument to the server; it adds no endpoint and writes
    no log line. It does not block and may be called any number of times.
    """
