"""Tables as text: in columns for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Container, Sequence


def columns(rows: Sequence[Sequence[str]], to_the_right: Container[int] = ()) -> list[str]:
    """Lines of a table in plain text, its columns two blanks apart.

    Args:
        rows: cells of each line, as many in each.
        to_the_right: indices of the columns that stand to the right, as numbers do.

    >>> columns([["a", "b", "c"], ["10", "200", "x"]], to_the_right=[1])
    ['a     b  c', '10  200  x']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in to_the_right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
