"""`python -m liftc` and the `liftc` script."""

from __future__ import annotations

import sys

from liftc.cli import main

if __name__ == "__main__":
    sys.exit(main())
