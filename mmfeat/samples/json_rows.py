"""Rows of JSON: an object a line, an array of objects, objects one after the other, or one object that holds rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Any

from mmfeat.errors import DataError
from mmfeat.samples.labels import SPLIT, part_named

JSON_KINDS = {int: "a number", float: "a number", list: "a list", str: "a text", bool: "true or false"}
_BLANK = " \t\r\n"
_CELLS = ("text", "image", "label")  # names that tell a row or a column from a container of rows


def read_json(
    path: str, pieces: Iterator[str], columns: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, row) of a file whose text comes in `pieces`.

    One object that is alone in a file may hold the rows: as a list of objects beside other values, by id, or by column
    or as lists of cells, as pandas writes them. `columns` tells ids from names of columns.
    """
    first = next((piece for piece in pieces if piece.strip(_BLANK)), "")
    pieces = chain([first], pieces)
    is_lines = _is_whole(first.lstrip(_BLANK).partition("\n")[0])
    values = _read_lines(path, pieces) if is_lines else _read_values(path, pieces)
    alone = list(islice(values, 2)) if first.lstrip(_BLANK).startswith("{") else []
    rows = _unwrapped(path, alone[0], columns) if len(alone) == 1 else chain(alone, values)
    for line, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{line}: {JSON_KINDS.get(type(row), 'null')}; one object a line is expected, {{...}}"
            )
        yield line, row


def _is_whole(line: str) -> bool:
    """Whether the first line of a file is all of an object, so that each line is one, or no JSON at all."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return not line.startswith(("[", "{"))


def _read_lines(path: str, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(pieces), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
        yield number, row


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in pieces:
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


def _read_values(path: str, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of the values in an array, or of values one after the other."""
    decode = json.JSONDecoder().raw_decode
    text, place, line, wanted = next(pieces, ""), 0, 1, 1
    brackets = 0  # that are open
    while True:
        begin = place
        while place < len(text) and text[place] in _BLANK + ",[]":
            place += 1
        line += text.count("\n", begin, place)
        brackets += text.count("[", begin, place) - text.count("]", begin, place)
        try:
            value, end = decode(text, place)
        except ValueError as error:
            more = "".join(piece for _, piece in zip(range(wanted), pieces, strict=False))
            if not more and place < len(text):
                kind = "an array of objects" if brackets else "one object a line"
                raise DataError(f"{path}:{line}: not JSON ({error}); {kind} is expected") from error
            if not more and brackets:
                raise DataError(f"{path}:{line}: the array does not end; the file is cut short") from None
            if not more:
                return
            text, place, wanted = text[place:] + more, 0, wanted * 2  # a long value takes few attempts
            continue
        yield line, value
        line, place, wanted = line + text.count("\n", place, end), end, 1


def _unwrapped(path: str, only: tuple[int, Any], columns: Collection[str]) -> Iterator[tuple[int, Any]]:
    """The rows in an object that is alone in a file; the object itself where it is a row or holds none."""
    value = only[1]
    if _is_row(value, columns):
        return iter([only])
    if len(value) == 1 and not _is_row(inner := next(iter(value.values())), columns) and _lists_in(inner):
        value = inner
    lists = _lists_in(value)
    if len(lists) > 1 and all(map(part_named, lists)):
        lists = {SPLIT: [{SPLIT: part, **row} for part, rows in lists.items() for row in rows]}
    if len(lists) > 1:
        raise DataError(f"{path}: {' and '.join(lists)} are lists of objects; write the one that is meant to a file")
    cells, names = value.get("data"), value.get("columns")
    if isinstance(names, list) and isinstance(cells, list) and cells and isinstance(cells[0], list):
        rows: list[Any] = [dict(zip(map(str, names), row, strict=False)) for row in cells]
    elif lists:
        rows = next(iter(lists.values()))
    elif set(value) & {*columns, *_CELLS} and _are_columns(value):
        rows = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    elif value and all(isinstance(item, dict) for item in value.values()):
        is_by_column = set(value) & {*columns, *_CELLS}
        rows = _by_column(value) if is_by_column else [{"id": id, **row} for id, row in value.items()]
    else:
        return iter([only])
    return ((number, row) for number, row in enumerate(rows, 1))


def _is_row(value: Any, columns: Collection[str]) -> bool:
    """Whether a value is a row, or no object at all."""
    return not isinstance(value, dict) or any(isinstance(value.get(name), str) for name in (*columns, *_CELLS))


def _lists_in(value: dict[str, Any]) -> dict[str, list[Any]]:
    """The lists of objects in an object."""
    return {name: item for name, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}


def _are_columns(value: dict[str, Any]) -> bool:
    """Whether an object is columns of cells, as `DataFrame.to_dict("list")` makes them, and not a row with lists."""
    return all(isinstance(item, list) for item in value.values()) and len({*map(len, value.values())}) == 1


def _by_column(value: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of columns that are objects with a cell a row, as `DataFrame.to_json` writes them."""
    keys = dict.fromkeys(key for column in value.values() for key in column)
    return [{name: column.get(key) for name, column in value.items()} for key in keys]
