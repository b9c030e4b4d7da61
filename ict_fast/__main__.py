"""`python -m ict_fast` is the program `ict-fast`."""

import sys

from ict_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
