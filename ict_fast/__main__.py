"""`python -m ict_fast` is the program `ict-fast`."""

import sys

from ict_fast.cli import main

if __name__ == "__main__":
    code = main()
    # An interrupt that has met an `exec` of text, as compilers have them, makes Python end a module's process
    # by SIGINT, though it was caught. Another `exec` makes it forget that.
    exec("")
    sys.exit(code)
