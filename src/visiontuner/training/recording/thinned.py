"""Rows by number, never more than so many: a recording of any training is bounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Thinned(Generic[Row]):
    """The first row and every n-th; when that is full, every second goes and n doubles.

    Args:
        every: n to begin with.
        most: rows at a time.
    """

    def __init__(self, every: int, most: int) -> None:
        self.every = every
        self._most = most
        self._rows: dict[int, Row] = {}

    def wants(self, number: int) -> bool:
        """Whether the row of a number, from 1, would be kept."""
        return number == 1 or number % self.every == 0

    def add(self, number: int, row: Row) -> None:
        """Take in a row that is wanted; numbers only grow."""
        while len(self._rows) >= self._most:
            self.every *= 2
            self._rows = {n: kept for n, kept in self._rows.items() if self.wants(n)}
        if self.wants(number):
            self._rows[number] = row

    def refill(self, rows: Iterable[tuple[int, Row]], every: int) -> None:
        """Go on with the rows of an earlier recording, and every so many from now on."""
        self.every = every
        self._rows = dict(rows)

    @property
    def numbers(self) -> list[int]:
        return list(self._rows)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())
