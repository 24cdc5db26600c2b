import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.csv_table import (
    BadRow,
    RowError,
    parse_interval,
    parse_rows,
    parse_seconds,
    parse_table,
    some,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text('",\n\r #;', max_size=6)


def written(rows):
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
    return stream.getvalue()


@given(st.lists(st.tuples(TEXT, TEXT, TEXT).filter(lambda row: any(field.strip() for field in row)), min_size=1))
def test_any_text_comes_back(rows):
    table = parse_table(written([("a", "b", "c"), *rows]), "t.csv", ("c", "a"))
    assert table.columns == ("a", "b", "c")
    assert [tuple(row.fields.values()) for row in table.rows] == rows
    assert table.bad == ()


@given(st.text(), st.booleans(), st.booleans())
def test_garbage_is_at_most_a_preprocess_error(text, comments, spaces):
    try:
        rows = list(parse_rows(text, "t.csv", comments=comments, spaces=spaces))
    except PreprocessError:
        return
    lines = [row.line if isinstance(row, BadRow) else row[0] for row in rows]
    assert lines == sorted(set(lines))


@given(TEXT)
def test_seconds_are_a_number_or_refused(text):
    try:
        value = parse_seconds(text, "start")
    except RowError:
        return
    assert 0 <= value <= 1e6
    assert value == float(text)


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1_0", "1e3", "٣", "2000000", "0x1", "9" * 500, ". "])
def test_what_is_no_time(text):
    with pytest.raises(RowError, match="expected seconds"):
        parse_seconds(text, "end")


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("000084", 84), ("12.500", 12.5), (".5", 0.5), ("7.", 7)])
def test_what_is_a_time(text, value):
    assert parse_seconds(text, "start") == value


def test_an_interval_ends_after_its_start():
    assert parse_interval("1", "2", ("from", "to")) == (1, 2)
    with pytest.raises(RowError, match=r"to: expected more than from \(2\), found 2"):
        parse_interval("2", "2.0", ("from", "to"))


def test_bad_rows_have_their_line():
    table = parse_table('a,b\n1,2\n\n"x"y,3\n4\n5,"6\n7"\n8,9,10\n', "t.csv", ("a",))
    assert [row.line for row in table.rows] == [2, 6]
    assert {row.line: row.problem for row in table.bad}[5] == "expected 2 fields, found 1"
    assert [row.line for row in table.bad] == [4, 5, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a,c\n", "holds a header and no row"),
        ("a,b\n1,2\n", "no column 'c'; expected the columns c in the first row, found a, b"),
        ("a,c,c\n1,2,3\n", "the column 'c' is there twice"),
        ('c\n1\n2\n"3\n4\n', "line 4: a quote is opened and never closed"),
    ],
)
def test_bad_files_are_errors(text, message):
    with pytest.raises(PreprocessError, match=r"^t\.csv: ") as caught:
        parse_table(text, "t.csv", ("c",))
    assert message in str(caught.value)


def test_only_the_first_names_are_shown():
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(list("abcde")) == "a, b, c and 2 more"
