"""Runs ict-fast's commands one after the other, each in a process of its own that has imported torch already.

Of standard input each line is a JSON list: a file for the output, and the words after the program's name. Of
standard output each line is an exit code.
"""

import importlib
import json
import os
import sys
import traceback

from ict_fast.cli import main


def run(output: str, words: list[str]) -> int:
    """The exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for name in ("torch._dynamo", "ict_fast.training.trainer", "ict_fast.evaluation"):
        importlib.import_module(name)
    for line in sys.stdin:
        output, *words = json.loads(line)
        print(run(output, words), flush=True)
