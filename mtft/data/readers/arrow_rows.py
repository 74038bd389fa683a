"""Arrow tables to rows: Parquet files and saved datasets.

Arrow gives every object the keys of all its neighbours, and null where one has no such key. A reader that hands these
on teaches the model `{"q": "Rome", "x": null}` for a call that had one argument. So a null in an object is no value;
nulls in a column of JSON text (`datasets.Json`, Arrow's extension `arrow.json`) were written by somebody, and stay.

A cell that Python has no value for (a date in the year 300,000, an unknown time zone, text that is no UTF-8) becomes an
`UnreadableCell`: an error of its row if a format reads it, and nothing otherwise.
"""

from __future__ import annotations

import io
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
    import pyarrow.parquet

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
            yield from _file_rows(path, file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}", do="make it again") from error


def _file_rows(path: str, file: pyarrow.parquet.ParquetFile) -> Iterator[dict[str, Any]]:
    """Rows of an open file. Dictionaries (of texts, as pandas' categories are) are read as what they stand for.

    Arrow would make the dictionary of a column anew, and there one text that is no UTF-8 fails the whole file.
    """
    import pyarrow.parquet

    schema = file.schema_arrow
    if all(_plain(field.type) == field.type for field in schema):
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from table_rows(batch)
        return
    with pyarrow.parquet.ParquetFile(path, metadata=_without_arrow_schema(file.metadata)) as as_stored:
        stored = as_stored.schema_arrow
        apart = [f.name for f in schema if f.type != _plain(f.type) == _plain(stored.field(f.name).type)]
        others = [name for name in schema.names if name not in apart]
        columns = (as_stored, apart), (file, others)
        streams = [
            (row for batch in source.iter_batches(batch_size=BATCH_ROWS, columns=names) for row in table_rows(batch))
            if names
            else ({} for _ in range(file.metadata.num_rows))
            for source, names in columns
        ]
        for own, rest in zip(*streams, strict=True):
            yield {name: own[name] if name in apart else rest[name] for name in schema.names}


def _without_arrow_schema(metadata: pyarrow.parquet.FileMetaData) -> pyarrow.parquet.FileMetaData:
    """The same without Arrow's own schema, which says which columns were dictionaries."""
    import pyarrow.parquet

    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    content = footer.getvalue().replace(b"ARROW:schema", b"ARROW:unread")
    return pyarrow.parquet.read_metadata(io.BytesIO(content))


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type with each dictionary replaced by its values, and large texts by texts where a dictionary is."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        value = _plain(kind.value_type)
        return pyarrow.string() if types.is_large_string(value) else value
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


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
