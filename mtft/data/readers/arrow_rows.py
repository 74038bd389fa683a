"""Arrow tables to rows: Parquet files and saved datasets.

Arrow gives every object the keys of all its neighbours, and null where one has no such key. A reader that hands these
on teaches the model `{"q": "Rome", "x": null}` for a call that had one argument. So a null in an object is no value;
nulls in a column of JSON text (`datasets.Json`, Arrow's extension `arrow.json`) were written by somebody, and stay.

A cell that Python has no value for (a date in the year 300,000, an unknown time zone, text that is no UTF-8) becomes an
`UnreadableCell`: an error of its row if a format reads it, and nothing otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtft.common.errors import UserError
from mtft.common.listing import listed
from mtft.data.readers.json_stream import unique_keys

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024
_UNDECODABLE = (ValueError, OverflowError, LookupError, RecursionError, NotImplementedError)  # ArrowInvalid: ValueError


@dataclass(frozen=True)
class UnreadableCell:
    """A cell that can't be decoded, and why."""

    why: str


def dataset_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset`, as they were before Arrow filled them up."""
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from table_rows(table)


def parquet_rows(path: str, name: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file. `name` is what messages call it.

    Raises UserError if it is none, or if two of its columns have one name.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            refuse_repeated(file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from table_rows(batch)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}", do="make it again") from error


def parquet_features(path: str) -> Mapping[str, Any]:
    """The `datasets` features that a Parquet file was written with; empty for any other file."""
    import pyarrow
    import pyarrow.parquet

    if not path.endswith(".parquet"):
        return {}
    from datasets import Features

    try:
        return Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # the rows speak for themselves


def refuse_repeated(columns: Sequence[str], name: str, line: int = 1) -> None:
    """UserError if two columns have one name: which of them counts can't be known."""
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(
            f"{name}:{line}: two columns are called {listed(map(repr, twice))}", do="rename or remove one of them"
        )


def table_rows(table: pyarrow.Table | pyarrow.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows of a table. A null column stays None (it is missing for that row); nulls further in are left out."""
    columns = [_cells(column, field.type) for column, field in zip(table.columns, table.schema, strict=True)]
    names = table.schema.names
    for cells in zip(*columns, strict=True):
        yield dict(zip(names, cells, strict=True))


def _cells(column: Any, kind: pyarrow.DataType) -> list[Any]:
    try:
        return _decoded(column, kind)
    except _UNDECODABLE:
        return [_cell(scalar, kind) for scalar in column]


def _decoded(column: Any, kind: pyarrow.DataType) -> list[Any]:
    values = column.to_pylist()
    return [_value(value, kind) for value in values] if _nested(kind) else values


def _cell(scalar: pyarrow.Scalar, kind: pyarrow.DataType) -> Any:
    try:
        value = scalar.as_py()
        return _value(value, kind) if _nested(kind) else value
    except _UNDECODABLE as error:
        return UnreadableCell(f"{type(error).__name__}: {str(error)[:200]}")


def _nested(kind: pyarrow.DataType) -> bool:
    import pyarrow

    return pyarrow.types.is_nested(kind) or isinstance(kind, pyarrow.BaseExtensionType)


def _value(value: Any, kind: pyarrow.DataType) -> Any:
    """A value of the type `kind`, JSON decoded and without the nulls that Arrow put into objects."""
    import pyarrow

    if value is None:
        return None
    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name != "arrow.json":
            return _value(value, kind.storage_type)
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # formats.py refuses it with its column
    if pyarrow.types.is_struct(kind):
        return {
            field.name: _value(value[field.name], field.type) for field in kind if value.get(field.name) is not None
        }
    if pyarrow.types.is_map(kind):
        return unique_keys([(key, _value(item, kind.item_type)) for key, item in value if item is not None])
    if pyarrow.types.is_nested(kind) and not pyarrow.types.is_union(kind):
        return [_value(item, kind.value_type) for item in value]
    return value
