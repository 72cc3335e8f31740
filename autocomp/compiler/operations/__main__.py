"""``python -m autocomp.compiler.operations`` prints docs/operations.md: what is compiled, from the compiler's own tables."""

from __future__ import annotations

from autocomp.compiler.operations.document import page

if __name__ == "__main__":
    print(page(), end="")
