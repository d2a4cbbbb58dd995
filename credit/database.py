"""Tables in databases: PostgreSQL through pg8000, SQLite, and whatever SQLAlchemy has a driver for.

Loans are only read: the connection is read-only where the database offers it. The password comes from an
environment variable and stands in no file, error, log or repr.
"""

import os
import re
import sqlite3
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import pandas as pd
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import NullPool

from fedfin.config import DataSource
from fedfin.errors import ConfigError

__all__ = ["read_database"]

_CONNECT_TIMEOUT_S = 10
_POSTGRES_DRIVER = "postgresql+pg8000"
_SECRET_OPTIONS = {"password", "passwd", "pwd", "passfile", "token", "secret"}
# SQLSTATE of PostgreSQL (its manual, appendix A) -> what it means here
_POSTGRES_REFUSALS = {
    "28P01": "refused the user or the password; correct the variable that data.password_env names",
    "28000": "does not let this user in; ask its administrator for read access",
    "3D000": "has no such database; correct data.url",
    "42P01": "has no such table; correct data.table or data.query",
    "3F000": "has no such schema; correct data.table or data.query",
    "42703": "has no such column; correct data.query",
    "42601": "cannot parse the query; correct data.query",
    "42501": "does not let this user read the table; ask its administrator for read access",
    "25006": "was asked to change data, and loans are only ever read; make data.query a SELECT",
}


def read_database(source: DataSource, base_dir: Path) -> pd.DataFrame:
    """Read a whole table or the result of a query.

    Args:
        source: With `url`, one of `table` (SCHEMA.TABLE or TABLE) and `query`, and `password_env` if the
            server asks for a password; an SQLite file is relative to `base_dir`.
        base_dir: Folder of the configuration file.

    Returns:
        All columns as objects of the driver's types, None where null; the index named `row`, from 1, in the
        order of the database, which is only fixed by an ORDER BY in a query.

    Raises:
        ConfigError: The URL cannot be used or holds a password, the variable is not set, nothing answers,
            or the database refuses; says which, and never the password.
    """
    engine = _engine(source, base_dir)
    try:
        with engine.connect() as connection:
            result = connection.execute(_statement(source))
            names, rows = list(result.keys()), result.fetchall()
    except exc.SQLAlchemyError as error:
        _refuse_database(error, engine)
    finally:
        engine.dispose()
    index = pd.RangeIndex(1, len(rows) + 1, name="row")
    columns = [pd.Series([row[i] for row in rows], index=index, dtype=object) for i in range(len(names))]
    return pd.concat(columns, axis=1).set_axis(names, axis=1)


def _statement(source: DataSource) -> sa.Executable:
    if source.table is not None:
        schema_name, _, name = source.table.rpartition(".")
        return sa.select(sa.literal_column("*")).select_from(sa.table(name, schema=schema_name or None))
    # A colon before a word would be a parameter to SQLAlchemy; a lender's query has none.
    return sa.text(re.sub(r"(?<![:\w\\]):(?=\w)", r"\\:", source.query or ""))


def _engine(source: DataSource, base_dir: Path) -> Engine:
    url = _url(source)
    options: dict[str, Any] = {}
    match url.get_backend_name():
        case "sqlite":
            url = _read_only_sqlite(url, base_dir)
        case "postgresql":
            options["execution_options"] = {"postgresql_readonly": True}
            if url.drivername == _POSTGRES_DRIVER:
                # pg8000 fails in an unnamed way where a password is asked for and there is none
                no_password = {} if url.password else {"password": ""}
                options["connect_args"] = {"timeout": _CONNECT_TIMEOUT_S} | no_password
        case _:
            pass
    try:
        return sa.create_engine(url, poolclass=NullPool, hide_parameters=True, **options)
    except (exc.NoSuchModuleError, ModuleNotFoundError):
        msg = f"the driver for {url.drivername} is not installed; install it, or export a file"
        raise ConfigError(msg) from None


def _url(source: DataSource) -> URL:
    try:
        url = sa.make_url(source.url or "")
    except (exc.ArgumentError, ValueError):
        msg = "data.url is not an SQLAlchemy URL; write it like postgresql://reader@db.bank.example/loans"
        raise ConfigError(msg) from None
    if url.password is not None or _SECRET_OPTIONS & {key.casefold() for key in url.query}:
        msg = (
            "data.url holds a password; take it out and name the variable that holds it in data.password_env"
        )
        raise ConfigError(msg)
    if url.drivername in {"postgresql", "postgres"}:
        url = url.set(drivername=_POSTGRES_DRIVER)
    if source.password_env is not None:
        password = os.environ.get(source.password_env)
        if not password:
            msg = f"data.password_env is {source.password_env}, and no such variable is set; set it"
            raise ConfigError(msg)
        url = url.set(password=password)
    return url


def _read_only_sqlite(url: URL, base_dir: Path) -> URL:
    """Open the file read-only: SQLite would create an absent one, empty, and find no table in it."""
    path = base_dir / (url.database or "")
    if not path.is_file():
        msg = f"data.url names the SQLite file {path}, which does not exist; correct it"
        raise ConfigError(msg)
    return url.set(database=f"file:{quote(str(path.resolve()))}", query={"mode": "ro", "uri": "true"})


def _refuse_database(error: exc.SQLAlchemyError, engine: Engine) -> NoReturn:
    """Say what a database's refusal means, without PostgreSQL's own text, which may quote rows."""
    cause = getattr(error, "orig", None)
    details = cause.args[0] if cause is not None and cause.args else ""
    url = engine.url
    where = url.database if url.host is None else f"{url.host}:{url.port or 'default port'}"
    if isinstance(details, dict):
        code = str(details.get("C", ""))
        other = f"refused with SQLSTATE {code}; correct data.url, data.table or data.query"
        what = _POSTGRES_REFUSALS.get(code, other)
        if code == "28P01" and url.password is None:
            what = "asks for a password; name the environment variable that holds it in data.password_env"
    elif isinstance(cause, sqlite3.Error):
        what = f"says {details}; correct data.url, data.table or data.query"
    elif isinstance(error, exc.ResourceClosedError):
        what = "was given a statement that returns no rows; make data.query a SELECT"
    else:
        what = "cannot be reached; start it, or correct host and port in data.url"
    msg = f"the database at {where} {what}"
    raise ConfigError(msg) from None
