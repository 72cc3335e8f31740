"""``python -m autocomp.cli`` is ``autocomp``."""

from autocomp.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
