"""How RESULTS.md writes tables and names files."""

from __future__ import annotations

from collections.abc import Sequence

NOT_YET = "not measured yet"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 10**9) -> str:
    """A Markdown table; columns from number `right` on are flushed right."""
    rule = ["---:" if number >= right else "---" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def link(file: str) -> str:
    return f"[{file}](results/{file})"
