import pytest

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.esc50 import list_esc50

HEADER = "filename,fold,target,category,esc10,src_file,take\n"
ROWS = (
    "1-100032-A-0.wav,1,0,dog,True,100032,A\n",
    "1-100038-A-14.wav,1,14,chirping_birds,False,100038,A\n",
    "5-9032-A-0.wav,5,0,dog,True,9032,A\n",
)


def build(root, rows=ROWS, files=None):
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text(HEADER + "".join(rows))
    for name in files if files is not None else [row.split(",")[0] for row in rows]:
        (root / "audio" / name).touch()
    return root


@pytest.mark.parametrize("folder", ["", "ESC-50-master"])
def test_folds(tmp_path, folder):
    root = build(tmp_path / "data" / folder)
    listing = list_esc50(tmp_path / "data")
    assert (listing.dataset, listing.split, listing.modalities) == ("esc50", "all", ("audio",))
    assert listing.classes == ("dog", "chirping_birds")
    assert listing.subsets == tuple(f"fold{fold}-{part}" for fold in range(1, 6) for part in ("train", "test"))
    sources = {source.id: source for source in listing.sources}
    assert sources.keys() == {"1-100032-A-0", "1-100038-A-14", "5-9032-A-0"}
    assert sources["5-9032-A-0"].location == root / "audio" / "5-9032-A-0.wav"
    assert sources["5-9032-A-0"].labels == ("dog",)
    assert sources["5-9032-A-0"].subsets == ("fold1-train", "fold2-train", "fold3-train", "fold4-train", "fold5-test")
    assert listing.notes == ()


def test_gaps_and_bad_rows(tmp_path):
    rows = [*ROWS, "a.wav,6,0,dog\n", "b.wav,6,0,dog,,,\n", "c.wav,1,-1,dog,,,\n", "d.wav,1,1,,,,\n"]
    rows += [ROWS[0], "e.wav,1,0,dog,,,\n", "e.wav,2,0,dog,,,\n"]
    listing = list_esc50(build(tmp_path, rows, [ROWS[0].split(",")[0], "e.wav", "more.wav"]))
    assert {source.name: source.rejection[0] for source in listing.sources if source.rejection} == {
        "audio/1-100038-A-14.wav": "source_not_found",
        "audio/5-9032-A-0.wav": "source_not_found",
        "audio/e.wav": "bad_annotation",
        "line 5 of meta/esc50.csv": "bad_annotation",
        "line 6 of meta/esc50.csv": "bad_annotation",
        "line 7 of meta/esc50.csv": "bad_annotation",
        "line 8 of meta/esc50.csv": "bad_annotation",
    }
    missing = next(source for source in listing.sources if source.id == "5-9032-A-0")
    assert "fold5-test" in missing.subsets
    assert listing.notes == (
        "1 file left out, for no row names them: audio/more.wav.",
        "1 row left out, for equal rows stand before them.",
    )


@pytest.mark.parametrize("row", ["x.wav,2,1,dog,,,\n", "x.wav,2,0,cat,,,\n"])
def test_one_target_for_each_category(tmp_path, row):
    with pytest.raises(PreprocessError, match=r"esc50\.csv: line 5: category"):
        list_esc50(build(tmp_path, [*ROWS, row]))


def test_no_table(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").touch()
    with pytest.raises(PreprocessError, match=r"expected meta/esc50\.csv, found none"):
        list_esc50(tmp_path)
