"""Tables in files: CSV (gzipped or not) and Parquet, every cell as the file has it.

CSV is read by Python's own reader and not by pandas', which pads short records and guesses types: here a
record that does not fit the header is refused by its line, and every cell stays text.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedfin.errors import ConfigError, DataError

__all__ = ["read_file"]

_SEPARATORS = ",;\t|"


def read_file(file: str, base_dir: Path) -> pd.DataFrame:
    """Read a whole file.

    Args:
        file: A .csv, .csv.gz or .parquet file, relative to `base_dir` or absolute.
        base_dir: Folder of the configuration file.

    Returns:
        All columns. CSV: every cell text, the index named `line` with the line each record begins on (header:
        1). Parquet: the file's types, the index named `row`, from 1.

    Raises:
        ConfigError: There is no such file, it may not be read, or its kind is not known.
        DataError: The content is not what the name says; names the line where there is one.
    """
    path = base_dir / file
    readers = {".csv": _read_csv, ".csv.gz": _read_csv, ".parquet": _read_parquet}
    reader = next((read for suffix, read in readers.items() if path.name.lower().endswith(suffix)), None)
    if reader is None:
        msg = f"data.path is {file}; give a .csv, .csv.gz or .parquet file"
        raise ConfigError(msg)
    try:
        return reader(path, file)
    except FileNotFoundError:
        msg = f"data.path is {file}: there is no {path}; correct it (relative to the configuration)"
        raise ConfigError(msg) from None
    except OSError as error:
        msg = f"data.path is {file}: {error.strerror or 'the file is damaged'}; make it readable"
        raise ConfigError(msg) from None


def _read_parquet(path: Path, origin: str) -> pd.DataFrame:
    try:
        with path.open("rb") as file:
            content = pq.ParquetFile(file).read()
    except pa.ArrowException:
        msg = f"{origin} is not a whole Parquet file; export it again"
        raise DataError(msg) from None
    # ignore_metadata: an index that pandas saved comes back as the column it was.
    table: pd.DataFrame = content.to_pandas(ignore_metadata=True)
    return table.set_axis(pd.RangeIndex(1, len(table) + 1, name="row"), axis=0)


def _read_csv(path: Path, origin: str) -> pd.DataFrame:
    try:
        with (
            gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
        ):
            return _read_csv_lines(text, origin)
    except UnicodeDecodeError:
        msg = f"{origin} is not UTF-8; export it again as UTF-8"
        raise DataError(msg) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        msg = f"{origin} is not a whole gzip file; export it again"
        raise DataError(msg) from None


def _read_csv_lines(lines: Iterable[str], origin: str) -> pd.DataFrame:
    """Read records, each held to the header's number of fields: a shifted one would fill other columns."""
    text = iter(lines)
    first = next(text, "")
    separator = max(_SEPARATORS, key=first.count)
    header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    if not header:
        msg = f"{origin} is empty; its first line must name the columns"
        raise DataError(msg)
    reader = csv.reader(text, delimiter=separator, strict=True)
    seen: dict[str, str] = {}  # one object for equal cells: a repeated one costs eight bytes
    records: list[list[str]] = []
    starts: list[int] = []
    begins = 2
    try:
        for record in reader:
            if len(record) == len(header):
                records.append([seen.setdefault(cell, cell) for cell in record])
                starts.append(begins)
            elif record:
                msg = (
                    f"{origin}: line {begins} has {len(record)} fields and the header {len(header)}; put a"
                    " text that holds a separator between quotes"
                )
                raise DataError(msg)
            begins = reader.line_num + 2
    except csv.Error as error:
        msg = f"{origin}: line {begins} cannot be read ({error}); correct its quotes"
        raise DataError(msg) from None
    cells = zip(*records, strict=True) if records else ([] for _ in header)
    index = pd.Index(starts, dtype=np.int64, name="line")
    columns = [pd.Series(list(column), index=index, dtype=object) for column in cells]
    return pd.concat(columns, axis=1).set_axis(header, axis=1)
