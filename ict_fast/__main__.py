"""`python -m ict_fast` is the program `ict-fast`."""

import sys


def main() -> int:
    """The program, from its first import on: Ctrl-C meanwhile is as quiet as later; returns the exit code."""
    try:
        from ict_fast import cli
    except KeyboardInterrupt:
        from ict_fast.errors import EXIT_SIGINT

        print("ict-fast: error: interrupted; nothing more was saved", file=sys.stderr)
        return EXIT_SIGINT
    return cli.main()


if __name__ == "__main__":
    code = main()
    # An interrupt that has met an `exec` of text, as compilers have them, makes Python end a module's process
    # by SIGINT, though it was caught. Another `exec` makes it forget that.
    exec("")
    sys.exit(code)
