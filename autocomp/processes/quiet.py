"""What libraries print past Python's own streams, silenced."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence what TVM's and LLVM's C++ sides print: a warning for every storage scope, a line for a feature that is not known."""
    if sys.stderr is not None:  # a daemon may have none
        sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
