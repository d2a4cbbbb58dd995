"""Loans from CSV, Parquet, SQLite and a real PostgreSQL, and every way in which a table is refused."""

import gzip
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fedfin.config import DataSource
from fedfin.credit.schema import Schema
from fedfin.credit.source import load_table, place, read_loans
from fedfin.errors import ConfigError, DataError

SCHEMA = Schema.from_yaml(
    """
label: {name: bad, bad: 1, good: 0, definition: 90 days past due within 12 months}
columns:
  - {name: income, kind: numeric, unit: EUR, minimum: 0, maximum: 100000, nullable: true}
  - {name: score, kind: numeric, minimum: 0, maximum: 900, integer: true, special_codes: {-1: no record}}
  - {name: home, kind: categorical, categories: [owner, rent], nullable: true}
""",
    "schema.yaml",
)
ROWS = ["1200.5,700,owner,0", ",-1,rent,1", "0,0,,0"]


@pytest.fixture
def write_csv(tmp_path):
    def write(*rows, header="income,score,home,bad", name="loans.csv"):
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return DataSource(path=name)

    return write


def assert_are_the_three_loans(loans):
    assert list(loans.frame.columns) == ["income", "score", "home"]
    assert_array_equal(loans.frame["income"].to_numpy(), [1200.5, np.nan, 0.0])
    assert_array_equal(loans.frame["score"].to_numpy(), [700.0, -1.0, 0.0])
    assert loans.frame["home"].tolist() == ["owner", "rent", None]
    assert [str(dtype) for dtype in loans.frame.dtypes] == ["float64", "float64", "object"]
    assert_array_equal(loans.labels, np.array([0, 1, 0], dtype=np.int64))
    assert loans.labels.dtype == np.int64


# Every source gives the same loans


def test_csv_gives_numbers_categories_and_outcomes(write_csv, tmp_path):
    assert_are_the_three_loans(read_loans(write_csv(*ROWS), SCHEMA, tmp_path))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_separator_of_a_csv_file_is_that_of_its_header(write_csv, tmp_path, separator):
    rows = [row.replace(",", separator) for row in ROWS]
    source = write_csv(*rows, header="income,score,home,bad".replace(",", separator))
    assert_are_the_three_loans(read_loans(source, SCHEMA, tmp_path))


def test_csv_may_be_gzipped_begin_with_a_byte_order_mark_and_hold_blank_lines(tmp_path):
    text = "\ufeff" + "\r\n\r\n".join(["income,score,home,bad", *ROWS])
    (tmp_path / "loans.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    assert_are_the_three_loans(read_loans(DataSource(path="loans.csv.gz"), SCHEMA, tmp_path))


def three_loans():
    return pd.DataFrame(
        {
            "income": [1200.5, None, 0],
            "score": [700, -1, 0],
            "home": ["owner", "rent", None],
            "bad": [0, 1, 0],
        }
    )


def test_parquet_gives_the_same_loans(tmp_path):
    three_loans().to_parquet(tmp_path / "loans.parquet")
    assert_are_the_three_loans(read_loans(DataSource(path="loans.parquet"), SCHEMA, tmp_path))


def test_a_column_that_pandas_saved_as_parquet_index_or_categories_is_a_column_all_the_same(tmp_path):
    loans = three_loans().astype({"home": "category", "bad": bool}).set_index("score")
    loans.to_parquet(tmp_path / "loans.parquet")
    source = DataSource(path="loans.parquet", values={"bad": {"true": "1", "false": "0"}})
    assert_are_the_three_loans(read_loans(source, SCHEMA, tmp_path))


@pytest.fixture
def sqlite_source(tmp_path):
    connection = sqlite3.connect(tmp_path / "loans.db")
    three_loans().to_sql("loans", connection, index=False)
    connection.close()
    return lambda **settings: DataSource(url="sqlite:///loans.db", **settings)


def test_sqlite_gives_the_same_loans_from_a_table_and_from_a_query(sqlite_source, tmp_path):
    assert_are_the_three_loans(read_loans(sqlite_source(table="loans"), SCHEMA, tmp_path))
    query = "SELECT * FROM loans WHERE coalesce(home, '') NOT LIKE '%:cave' ORDER BY rowid"
    assert_are_the_three_loans(read_loans(sqlite_source(query=query), SCHEMA, tmp_path))


def test_an_absolute_path_does_not_start_at_the_configuration(write_csv, tmp_path):
    write_csv(*ROWS)
    source = DataSource(path=str(tmp_path / "loans.csv"))
    assert_are_the_three_loans(read_loans(source, SCHEMA, Path("/nowhere")))


# The lender's own names and spellings


def test_local_names_spellings_and_missing_markers_are_translated(write_csv, tmp_path):
    source = DataSource(
        path=write_csv(
            "1200.5,700,eigen,betaald,x",
            "onbekend,-1, huur ,verloren,x",
            "0,0,onbekend,betaald,x",
            header="inkomen,score,woning,afloop,home",
        ).path,
        columns={"income": "inkomen", "home": "woning", "bad": "afloop"},
        values={"home": {"eigen": "owner", "huur": "rent"}, "bad": {"betaald": "0", "verloren": "1"}},
        missing=("onbekend",),
    )
    assert_are_the_three_loans(read_loans(source, SCHEMA, tmp_path))


def test_codes_of_a_database_are_translated_by_their_digits(tmp_path):
    loans = three_loans().assign(home=[2.0, 7.0, None])
    loans.to_parquet(tmp_path / "loans.parquet")
    source = DataSource(path="loans.parquet", values={"home": {"2": "owner", "7": "rent"}})
    assert_are_the_three_loans(read_loans(source, SCHEMA, tmp_path))


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"columns": {"incom": "inkomen"}},
            "data.columns names incom, which the schema lacks; it has bad, home",
        ),
        (
            {"columns": {"income": "x", "score": "x"}},
            "data.columns maps x to income and to another column",
        ),
        ({"values": {"hom": {}}}, "data.values names hom, which the schema lacks"),
        (
            {"values": {"score": {"none": "-1"}}},
            "data.values.score is for spellings, and score is numeric; rem",
        ),
        (
            {"values": {"home": {"eigen": "own"}}},
            r"data.values.home.eigen is own, no category of the sch.*; use one",
        ),
    ],
)
def test_a_translation_to_what_the_schema_lacks_is_refused(write_csv, tmp_path, settings, refusal):
    with pytest.raises(ConfigError, match=refusal):
        read_loans(DataSource(path=write_csv(*ROWS).path, **settings), SCHEMA, tmp_path)


def test_a_mapped_column_that_is_absent_is_not_replaced_by_one_of_the_same_name(write_csv, tmp_path):
    source = DataSource(path=write_csv(*ROWS).path, columns={"income": "net_income"})
    with pytest.raises(
        DataError, match=r"column income: the table has no such column; map it in data\.columns"
    ):
        read_loans(source, SCHEMA, tmp_path)


# A cell that breaks a rule is refused by row, column and rule, and never shown


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        (
            "12OO,700,owner,0",
            "column income: not a number; write a number, with a decimal point and no",
        ),
        ('"1.234,5",700,owner,0', "column income: not a number"),
        ("0x10,700,owner,0", "column income: not a number"),
        ("1_000,700,owner,0", "column income: not a number"),
        ("true,700,owner,0", "column income: not a number"),
        ("-inf,700,owner,0", "column income: an infinite number; write a number or leave the cell empty"),
        ("1e999,700,owner,0", "column income: an infinite number"),
        (
            "100001,700,owner,0",
            "column income: outside the valid range 0 to 100000 EUR; correct it at its",
        ),
        (
            "5,-2,owner,0",
            "column score: outside the valid range 0 to 900; correct it at its source, or ask",
        ),
        ("5,700.5,owner,0", "column score: not a whole number; correct it"),
        (
            "5,NA,owner,0",
            "column score: missing, which the schema does not allow; fill it in, leave",
        ),
        (
            "5,700,rnet,0",
            r"column home: a category that the schema does not know \('rnet'\); translate it",
        ),
        (
            "5,700,owner,",
            "column bad: the outcome is missing; leave loans without an outcome out",
        ),
        (
            "5,700,owner,2",
            r"column bad: an outcome that is neither bad nor good \('2'\); translate",
        ),
    ],
)
def test_a_cell_that_breaks_a_rule_is_refused_at_its_row_and_line(write_csv, tmp_path, row, refusal):
    with pytest.raises(DataError, match=rf"^loans\.csv: row 3 \(line 4\), {refusal}") as refused:
        read_loans(write_csv(*ROWS[:2], row), SCHEMA, tmp_path)
    assert "1200.5" not in str(refused.value)
    number = row.split(",")[0]
    assert number in {"5", "true"} or number not in str(refused.value)


def test_the_line_is_that_of_the_file_even_after_a_text_of_two_lines(write_csv, tmp_path):
    source = write_csv('1,1,owner,0,"two\nlines"', "", "x,1,owner,0,", header="income,score,home,bad,remark")
    with pytest.raises(DataError, match=r"row 2 \(line 5\), column income: not a number"):
        read_loans(source, SCHEMA, tmp_path)


def test_the_first_problem_is_told_and_the_others_are_counted(write_csv, tmp_path):
    source = write_csv("5,700,owner,0", "x,1,cave,2", "5,-9,owner,0")
    with pytest.raises(DataError, match=r"row 2 .*column income.* \(3 more; `fedfin client check` lists all"):
        read_loans(source, SCHEMA, tmp_path)


def test_a_missing_column_is_refused_with_the_setting_to_mend(write_csv, tmp_path):
    source = write_csv("5,owner,0", header="Income,home,bad")
    with pytest.raises(DataError, match=r"column income: .* map it in data\.columns, as income: Income \(1"):
        read_loans(source, SCHEMA, tmp_path)


def test_many_unknown_spellings_are_not_shown_because_they_may_be_names(write_csv, tmp_path):
    source = write_csv(*(f"5,700,Person {i},0" for i in range(30)))
    with pytest.raises(DataError, match="in 30 spellings: this looks like another column") as refused:
        read_loans(source, SCHEMA, tmp_path)
    assert "Person" not in str(refused.value)


@given(st.lists(st.tuples(st.integers(0, 100_000), st.booleans()), min_size=1, max_size=20), st.data())
def test_a_spoiled_cell_is_found_wherever_it_stands(tmp_path_factory, loans, data):
    folder = tmp_path_factory.mktemp("spoiled")
    row = data.draw(st.integers(1, len(loans)))
    lines = [f"{income},1,rent,{int(bad)}" for income, bad in loans]
    lines[row - 1] = "spoiled,1,rent,0"
    (folder / "loans.csv").write_text("\n".join(["income,score,home,bad", *lines]))
    with pytest.raises(DataError, match=rf"row {row} \(line {row + 1}\), column income"):
        read_loans(DataSource(path="loans.csv"), SCHEMA, folder)


def test_no_value_stands_in_the_repr_of_loans(write_csv, tmp_path):
    assert repr(read_loans(write_csv(*ROWS), SCHEMA, tmp_path)) == "Loans(3 columns, rows not shown)"


def test_a_table_keeps_every_cell_as_it_was_read(write_csv, tmp_path):
    table = load_table(write_csv("007,1,NA,x"), tmp_path)
    assert table.to_dict("records") == [{"income": "007", "score": "1", "home": None, "bad": "x"}]
    assert place(table, 1) == "row 1 (line 2)"


# A file that is no table


@pytest.mark.parametrize(
    ("name", "content", "error", "refusal"),
    [
        ("loans.csv", b"", DataError, "loans.csv is empty; its first line must name the columns"),
        ("loans.csv", b"income,score,home,bad\n", DataError, "loans.csv holds no loans; correct data.path"),
        (
            "loans.csv",
            b"a,b\n1,2\n1,2,3\n",
            DataError,
            "line 3 has 3 fields and the header 2; put a text",
        ),
        ("loans.csv", b"a,b\n1\n", DataError, "line 2 has 1 fields and the header 2"),
        ("loans.csv", b'a,b\n1,"2\n', DataError, "line 2 cannot be read .*; correct its quotes"),
        ("loans.csv", b"a,a\n1,2\n", DataError, "more than one column named a; rename all but one"),
        ("loans.csv", "a,b\n1,é\n".encode("latin-1"), DataError, "is not UTF-8; export it again as UTF-8"),
        ("loans.csv.gz", b"a,b\n1,2\n", DataError, "is not a whole gzip file; export it again"),
        (
            "loans.csv.gz",
            gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-9],
            DataError,
            "is not a whole gzip file",
        ),
        ("loans.parquet", b"PAR1", DataError, "is not a whole Parquet file; export it again"),
        ("loans.xlsx", b"", ConfigError, "data.path is loans.xlsx; give a .csv, .csv.gz or .parquet file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, name, content, error, refusal):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=refusal):
        read_loans(DataSource(path=name), SCHEMA, tmp_path)


@pytest.mark.parametrize("name", ["absent.csv", "absent.csv.gz", "absent.parquet"])
def test_a_file_that_is_not_there_is_refused_by_its_whole_path(tmp_path, name):
    with pytest.raises(ConfigError, match=f"data.path is {name}: there is no {tmp_path}/{name}; correct it"):
        load_table(DataSource(path=name), tmp_path)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "loans.csv").mkdir()
    with pytest.raises(ConfigError, match=r"data\.path is loans\.csv: Is a directory; make it readable"):
        load_table(DataSource(path="loans.csv"), tmp_path)


# A database that refuses


def test_an_absent_sqlite_file_is_refused_and_not_created(tmp_path):
    with pytest.raises(ConfigError, match=r"the SQLite file .*absent\.db, which does not exist; correct it"):
        load_table(DataSource(url="sqlite:///absent.db", table="loans"), tmp_path)
    assert not (tmp_path / "absent.db").exists()


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"table": "loan"}, "no such table: loan; correct data.url, data.table or data.query"),
        ({"query": "SELEC 1"}, "syntax error"),
        ({"query": "DELETE FROM loans"}, "readonly database"),
    ],
)
def test_what_sqlite_cannot_do_is_refused(sqlite_source, tmp_path, settings, refusal):
    with pytest.raises(ConfigError, match=refusal):
        load_table(sqlite_source(**settings), tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "loans.db").write_text("not a database at all " * 99)
    with pytest.raises(ConfigError, match=r"file is not a database; correct data\.url"):
        load_table(DataSource(url="sqlite:///loans.db", table="loans"), tmp_path)


@pytest.mark.parametrize(
    ("url", "refusal"),
    [
        ("loans", "data.url is not an SQLAlchemy URL; write it like postgresql://"),
        (
            "oracle+nothing://db/loans",
            "the driver for oracle.nothing is not installed; install it, or",
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(tmp_path, url, refusal):
    with pytest.raises(ConfigError, match=refusal):
        load_table(DataSource(url=url, table="loans"), tmp_path)


# PostgreSQL, real


@pytest.fixture
def postgres_source(postgres, monkeypatch):
    monkeypatch.setenv("LOANS_PASSWORD", postgres.password)
    postgres.run(
        "DROP SCHEMA IF EXISTS lending CASCADE",
        "CREATE SCHEMA lending",
        'CREATE TABLE lending."Loans" (id serial, income numeric(9, 2), score int, home text, bad boolean)',
        """INSERT INTO lending."Loans" (income, score, home, bad) VALUES
           (1200.50, 700, 'owner', false), (NULL, -1, 'rent', true), (0, 0, NULL, false)""",
    )
    defaults = {
        "url": postgres.url,
        "table": "lending.Loans",
        "password_env": "LOANS_PASSWORD",
        "values": {"bad": {"true": "1", "false": "0"}},
    }
    return lambda **settings: DataSource(**{**defaults, **settings})


def test_postgresql_gives_the_same_loans_from_a_table_and_from_a_query(postgres_source, tmp_path):
    assert_are_the_three_loans(read_loans(postgres_source(), SCHEMA, tmp_path))
    query = (
        'SELECT id::int, income, score, home, bad FROM lending."Loans"'
        " WHERE coalesce(home, '') NOT LIKE '%:cave' ORDER BY id"
    )
    assert_are_the_three_loans(read_loans(postgres_source(table=None, query=query), SCHEMA, tmp_path))


def test_a_wrong_cell_of_postgresql_is_refused_by_its_row(postgres, postgres_source, tmp_path):
    postgres.run(
        'ALTER TABLE lending."Loans" ALTER income TYPE float8',
        "INSERT INTO lending.\"Loans\" (income, score, home, bad) VALUES ('Infinity', 1, 'rent', true)",
    )
    with pytest.raises(DataError, match=r"^table lending\.Loans: row 4, column income: an infinite number"):
        read_loans(postgres_source(), SCHEMA, tmp_path)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"table": "lending.loans"}, "has no such table; correct data.table or data.query"),
        ({"table": "borrowing.loans"}, "has no such table; correct data.table or data.query"),
        (
            {"table": None, "query": 'SELECT salary FROM lending."Loans"'},
            "has no such column; correct data",
        ),
        ({"table": None, "query": "SELEC 1"}, "cannot parse the query; correct data.query"),
        ({"table": None, "query": "SELECT 1/0"}, "refused with SQLSTATE 22012"),
        (
            {"table": None, "query": 'DELETE FROM lending."Loans" RETURNING *'},
            "was asked to change data, and",
        ),
        ({"table": None, "query": "SET work_mem = 9000"}, "returns no rows; make data.query a SELECT"),
        ({"password_env": "NOT_SET"}, "data.password_env is NOT_SET, and no such variable is set; set it"),
        (
            {"password_env": None},
            "asks for a password; name the environment variable that holds it",
        ),
    ],
)
def test_what_postgresql_refuses_is_told_with_its_mend(postgres_source, tmp_path, settings, refusal):
    with pytest.raises(ConfigError, match=refusal):
        load_table(postgres_source(**settings), tmp_path)


def test_a_wrong_password_is_refused_and_never_shown(postgres_source, tmp_path, monkeypatch):
    monkeypatch.setenv("LOANS_PASSWORD", "tr0ub4dor")
    refusal = "refused the user or the password; correct the variable that data.password_env names"
    with pytest.raises(ConfigError, match=refusal) as refused:
        load_table(postgres_source(), tmp_path)
    assert refused.value.__cause__ is None
    assert "tr0ub4dor" not in f"{refused.value}{refused.value.__context__}{postgres_source()!r}"


def test_an_absent_database_and_an_unreachable_server_are_refused(postgres, postgres_source, tmp_path):
    with pytest.raises(ConfigError, match=r"has no such database; correct data\.url"):
        load_table(postgres_source(url=postgres.url.replace("/postgres", "/absent")), tmp_path)
    with pytest.raises(
        ConfigError, match=r"database at 127\.0\.0\.1:1 cannot be reached; start it, or correct"
    ):
        load_table(postgres_source(url="postgresql://owner@127.0.0.1:1/postgres"), tmp_path)


def test_a_user_who_may_not_read_is_told_to_ask_for_it(postgres, postgres_source, tmp_path):
    postgres.run("DROP ROLE IF EXISTS clerk", f"CREATE ROLE clerk LOGIN PASSWORD '{postgres.password}'")
    postgres.run("GRANT USAGE ON SCHEMA lending TO clerk")
    with pytest.raises(ConfigError, match="does not let this user read the table; ask its administrator"):
        load_table(postgres_source(url=postgres.url.replace("owner@", "clerk@")), tmp_path)
