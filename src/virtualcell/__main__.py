"""`python -m virtualcell`, which is the command `virtualcell`."""

import sys

from virtualcell.cli import main

if __name__ == "__main__":
    sys.exit(main())
