import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.base import RemoteFile, Segment
from avid_pipeline.preprocess.sources.csv_table import RowError
from avid_pipeline.preprocess.sources.folder import list_folder, locate, parse_csv, parse_jsonl


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def by_name(listing):
    assert len({source.name for source in listing.sources}) == len(listing.sources)
    return {source.name: source for source in listing.sources}


def test_a_tree(tmp_path):
    names = ("-a b.mp4", ".hidden.mkv", "deep/er/ü 'q'.webm")
    listing = list_folder(tree(tmp_path, *names), modalities=("audio",), dataset="mine", split="all")
    assert (listing.dataset, listing.split, listing.modalities) == ("mine", "all", ("audio",))
    assert (listing.classes, listing.notes) == ((), ())
    assert {name: source.location for name, source in by_name(listing).items()} == {n: tmp_path / n for n in names}
    assert by_name(listing)["deep/er/ü 'q'.webm"].id == "ü 'q'"
    assert {source.labels for source in listing.sources} == {()}


def test_csv_list(tmp_path):
    root = tree(tmp_path / "lists", "videos/a.mp4", "b, c.mp4")
    other = tree(tmp_path / "other", "d.mp4") / "d.mp4"
    path = root / "list.CSV"
    path.write_text(
        "id,url,label,start,end,views\n"
        ",videos/a.mp4,two;one,,,9\n"
        f"named,{other},one,1.5,2,9\n"
        ',"b, c.mp4",,,,9\n'
        ",./videos/a.mp4,one; two,,,9\n"
        ",s3://bucket/deep/x.mp4,,0,10,9\n"
        ",https://host/a%20b.mp4,,,,9\n"
        ",gone.mp4,three,,,9\n"
    )
    listing = list_folder(path)
    assert listing.classes == ("one", "three", "two")
    assert listing.modalities == ("video", "audio")
    sources = by_name(listing)
    assert sources["videos/a.mp4"].location == root / "videos" / "a.mp4"
    assert sources["videos/a.mp4"].labels == ("two", "one")
    assert sources[f"{other}#t=1.5,2"].segment == Segment(1.5, 2)
    assert sources[f"{other}#t=1.5,2"].id == "named"
    assert sources["b, c.mp4"].location == root / "b, c.mp4"
    assert sources["s3://bucket/deep/x.mp4#t=0,10"].location == RemoteFile("s3://bucket", "deep/x.mp4")
    assert sources["https://host/a%20b.mp4"].location == RemoteFile("https://host", "a b.mp4")
    assert sources["gone.mp4"].rejection[0] == "source_not_found"
    assert sources["gone.mp4"].location is None
    assert listing.notes == (
        "1 column ignored: views; those known are url, label, start, end, id.",
        "1 row left out, for equal rows stand before them.",
    )


def test_jsonl_list(tmp_path):
    entries = [
        {"url": "a.mp4", "label": "x;y"},
        {"url": " b.mp4", "label": ["x", "z"], "start": 0, "end": 2.25, "title": "t"},
        {"url": "c.mp4", "label": None, "start": None},
    ]
    path = tree(tmp_path, "a.mp4", " b.mp4", "c.mp4") / "list.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    listing = list_folder(path)
    sources = by_name(listing)
    assert {name: source.labels for name, source in sources.items()} == {
        "a.mp4": ("x;y",),
        " b.mp4#t=0,2.25": ("x", "z"),
        "c.mp4": (),
    }
    assert not any(source.rejection for source in listing.sources)
    assert listing.notes == ("1 field ignored: title; those known are url, label, start, end, id.",)


@pytest.mark.parametrize(
    "row", ["'',1,2,3", "a.mp4,5", "a.mp4,,5", "a.mp4,5,5", "a.mp4,x,5", "ftp://h/x.mp4,,", "s3://bucket,,", "http://[x/y,,",
            "https://h/x?y=1,,"]
)  # fmt: skip
def test_bad_csv_rows(tmp_path, row):
    path = tree(tmp_path, "a.mp4") / "list.csv"
    path.write_text(f"url,start,end\na.mp4,,\n{row}\n")
    rejected = [source for source in list_folder(path).sources if source.rejection]
    assert [source.rejection[0] for source in rejected] == ["bad_annotation"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"label": "x"}', '{"url": 3}', '{"url": "a.mp4", "start": 1}', '{"url": "a.mp4", "end": 1}',
     '{"url": "a.mp4", "start": NaN, "end": 1}', '{"url": "a.mp4", "start": true, "end": 2}',
     '{"url": "a.mp4", "start": 2, "end": 1e999}', '{"url": "a.mp4", "label": 3}', '{"url": "a.mp4", "label": [3]}',
     '{"url": "\\ud800"}', '{"url": "a\\u0000"}', "[" * 100_000, '{"url": "a.mp4", "end": ' + "9" * 5000 + "}"],
    ids=range(16),
)  # fmt: skip
def test_bad_json_lines(tmp_path, line):
    path = tree(tmp_path, "a.mp4") / "list.jsonl"
    path.write_text(f'{{"url": "a.mp4"}}\n{line}\n')
    rejected = [source for source in list_folder(path).sources if source.rejection]
    assert [(source.name, source.rejection[0]) for source in rejected] == [("line 2 of list.jsonl", "bad_annotation")]


def test_contradictions(tmp_path):
    path = tree(tmp_path, "a.mp4", "b.mp4") / "list.csv"
    path.write_text("url,label,start,end\na.mp4,x,,\na.mp4,y,,\nb.mp4,x,0,1\nb.mp4,y,1,2\n")
    sources = by_name(list_folder(path))
    assert sources["a.mp4"].rejection == ("bad_annotation", "lines 2 and 3 differ in label or id; keep the right one")
    assert {name for name, source in sources.items() if not source.rejection} == {"b.mp4#t=0,1", "b.mp4#t=1,2"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "path\nx\n", "no column 'url'"),
        ("a.csv", "url,start\nx.mp4,1\n", "not one of 1 rows can be used"),
        ("a.jsonl", "\n", "is empty"),
        ("a.jsonl", "url\nx\n", "not one of 2 rows can be used; line 1: is no JSON"),
        ("a.txt", "x", "expected a folder, or a list that ends in .csv or .jsonl"),
        ("missing.csv", None, "cannot read it"),
        ("missing", None, "does not exist"),
    ],
)
def test_bad_lists(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(PreprocessError) as caught:
        list_folder(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("url", "base", "place"),
    [
        ("a b.mp4", "s3://bucket/lists", RemoteFile("s3://bucket", "lists/a b.mp4")),
        ("../a.mp4", "s3://bucket/lists", RemoteFile("s3://bucket", "a.mp4")),
        ("a.mp4", "s3://bucket", RemoteFile("s3://bucket", "a.mp4")),
        ("a.mp4", "https://host/x%20y", RemoteFile("https://host", "x y/a.mp4")),
        ("gs://b/a.mp4", "s3://bucket/lists", RemoteFile("gs://b", "a.mp4")),
    ],
)
def test_lists_in_object_stores(url, base, place):
    assert locate(url, base)[1] == place


def test_lists_do_not_lead_out_of_their_bucket():
    with pytest.raises(RowError, match="leads out of s3://bucket"):
        locate("../../a.mp4", "s3://bucket/lists")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
URL = TEXT.filter(str.strip)
LABELS = st.lists(TEXT.map(lambda text: text.replace(";", "").strip()).filter(bool), unique=True, max_size=3)


@given(st.lists(st.tuples(URL, LABELS), min_size=1))
def test_csv_comes_back(rows):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerows([("label", "url"), *((";".join(labels), url) for url, labels in rows)])
    entries, bad, notes = parse_csv(stream.getvalue(), "list.csv")
    assert [(entry.url, list(entry.labels)) for entry in entries] == rows
    assert (bad, notes) == ([], [])


@given(st.lists(st.tuples(URL, LABELS, st.booleans()), min_size=1))
def test_jsonl_comes_back(rows):
    lines = [json.dumps({"url": url, "label": labels}, ensure_ascii=ascii) for url, labels, ascii in rows]
    entries, bad, notes = parse_jsonl("\n".join(lines), "list.jsonl")
    assert [(entry.url, list(entry.labels)) for entry in entries] == [row[:2] for row in rows]
    assert (bad, notes) == ([], [])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ENTRY = st.dictionaries(st.sampled_from(["url", "label", "start", "end", "id", "x"]), JSON)


@given(st.text() | st.lists(ENTRY.map(json.dumps)).map("\n".join), st.sampled_from([".csv", ".jsonl"]))
def test_garbage_is_at_most_a_preprocess_error(tmp_path_factory, text, ending):
    path = tmp_path_factory.mktemp("garbage") / f"list{ending}"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        listing = list_folder(path)
    except PreprocessError:
        return
    assert by_name(listing)
