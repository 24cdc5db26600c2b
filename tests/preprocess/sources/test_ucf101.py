import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.ucf101 import add_line, list_ucf101, parse_class_numbers

FILES = (
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
    "HandstandPushups/v_HandStandPushups_g01_c01.avi",
)
LISTS = {
    "classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n",
    "trainlist01.txt": f"{FILES[1]} 1\r\n",
    "testlist01.txt": f"{FILES[0]}\r\n{FILES[2]}\r\n",
    "trainlist02.txt": f"{FILES[0]} 1\r\n{FILES[2]} 2\r\n",
}


def build(root, folder="UCF-101", files=FILES):
    for name in files:
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root / folder


def write_lists(folder, lists=LISTS):
    folder.mkdir(parents=True)
    for name, text in lists.items():
        (folder / name).write_text(text)
    return folder


def subsets(listing):
    assert len({source.name for source in listing.sources}) == len(listing.sources)
    return {source.name: source.subsets for source in listing.sources}


EXPECTED = {
    FILES[0]: ("fold1-test", "fold2-train"),
    FILES[1]: ("fold1-train",),
    FILES[2]: ("fold1-test", "fold2-train"),
}


@pytest.mark.parametrize("place", ["ucfTrainTestlist", "splits", "UCF-101/lists/deep", "elsewhere"])
def test_folds(tmp_path, place):
    """The lists beside the videos, below them, or where the user says."""
    root = build(tmp_path)
    lists = write_lists(tmp_path / place)
    listing = list_ucf101(root, lists if place == "elsewhere" else None)
    assert (listing.dataset, listing.split, listing.modalities) == ("ucf101", "all", ("video",))
    assert listing.classes == ("ApplyEyeMakeup", "HandstandPushups")
    assert listing.subsets == ("fold1-train", "fold1-test", "fold2-train")
    assert subsets(listing) == EXPECTED
    assert listing.notes == ()
    assert {source.location for source in listing.sources} == {root / name for name in FILES}
    assert {source.labels[0] for source in listing.sources} == set(listing.classes)
    assert not any(source.rejection for source in listing.sources)


def test_the_parent_of_videos_and_lists(tmp_path):
    build(tmp_path, "videos")
    write_lists(tmp_path / "splits")
    listing = list_ucf101(tmp_path)
    assert subsets(listing) == EXPECTED
    assert {source.path for source in listing.sources} == {f"videos/{name}" for name in FILES}
    assert listing.notes == ()


def test_class_order_is_that_of_the_numbers(tmp_path):
    write_lists(tmp_path / "splits", {"classInd.txt": "1 HandstandPushups\n2 ApplyEyeMakeup\n"})
    listing = list_ucf101(build(tmp_path))
    assert listing.classes == ("HandstandPushups", "ApplyEyeMakeup")


def test_without_lists(tmp_path):
    listing = list_ucf101(build(tmp_path))
    assert listing.classes == ("ApplyEyeMakeup", "HandstandPushups")
    assert set(subsets(listing).values()) == {()}
    assert listing.notes == ("No official lists found, so there are no subsets; give --splits.",)


def test_without_class_numbers(tmp_path):
    write_lists(tmp_path / "splits", {name: text for name, text in LISTS.items() if name != "classInd.txt"})
    listing = list_ucf101(build(tmp_path))
    assert listing.classes == ("ApplyEyeMakeup", "HandstandPushups")
    assert subsets(listing) == EXPECTED
    assert "alphabetical" in listing.notes[0]


def test_listed_but_missing_and_there_but_unlisted(tmp_path):
    files = (FILES[0], FILES[1], "ApplyEyeMakeup/v_new.mp4", "Unknown/v_x.avi", "stray.avi", "Readme.txt")
    root = build(tmp_path, files=files)
    write_lists(tmp_path / "splits")
    listing = list_ucf101(root)
    rejected = {source.name: source.rejection[0] for source in listing.sources if source.rejection}
    assert rejected == {
        FILES[2]: "source_not_found",
        "Unknown/v_x.avi": "no_class_folder",
        "stray.avi": "no_class_folder",
    }
    assert subsets(listing) == EXPECTED | dict.fromkeys(files[2:5], ())
    assert listing.classes == ("ApplyEyeMakeup", "HandstandPushups")
    assert listing.notes == (
        "1 file left out, for their names say they are no videos: Readme.txt.",
        "3 videos in no list, so in no subset: ApplyEyeMakeup/v_new.mp4, Unknown/v_x.avi, stray.avi.",
    )


def test_videos_in_another_container_and_twice(tmp_path):
    root = build(tmp_path, files=[name.replace(".avi", ".mp4") for name in FILES])
    write_lists(tmp_path / "splits")
    assert subsets(list_ucf101(root)) == EXPECTED
    build(tmp_path, files=[FILES[0]])
    listing = list_ucf101(root)
    assert subsets(listing) == EXPECTED
    second = FILES[0].replace(".avi", ".mp4")
    assert listing.notes == (f"1 file left out, for the same video stands before: {second}.",)


def test_bad_lines_and_contradictions(tmp_path):
    lists = LISTS | {
        "trainlist01.txt": f"{FILES[1]} 1\nno slash 1\nNoClass/v_x.avi 3\n{FILES[1]} 1\n{FILES[0]} 1\n",
        "trainlist02.txt": f"{FILES[2]} 1\n",
    }
    write_lists(tmp_path / "splits", lists)
    listing = list_ucf101(build(tmp_path))
    rejected = {source.name: source.rejection for source in listing.sources if source.rejection}
    assert {reason for reason, _ in rejected.values()} == {"bad_annotation"}
    assert rejected.keys() == {
        "line 2 of trainlist01.txt",
        "line 3 of trainlist01.txt",
        FILES[0],
        FILES[2],
    }
    assert "is test of fold 1, but train elsewhere" in rejected[FILES[0]][1]
    assert "class number 1 is not that of HandstandPushups (2)" in rejected[FILES[2]][1]


def test_two_folders_of_lists_and_none(tmp_path):
    root = build(tmp_path)
    with pytest.raises(PreprocessError, match="holds no official list"):
        list_ucf101(root, root)
    write_lists(root / "one")
    write_lists(root / "two")
    with pytest.raises(PreprocessError, match="'one', 'two' hold official lists"):
        list_ucf101(root)
    assert list_ucf101(root, root / "two").notes[0].endswith("one/classInd.txt, one/testlist01.txt, "
                                                             "one/trainlist01.txt and 1 more.")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("1 a\n3 b", "found [1, 3]"), ("0 a\n1 b", "found [0, 1]"), ("a 1", "line 1"), ("1 a\n1 b", "line 2"), ("", "[]")],
)
def test_damaged_class_numbers(text, message):
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line]
    with pytest.raises(PreprocessError, match=r"^classInd\.txt: ") as caught:
        parse_class_numbers(lines)
    assert message in str(caught.value)


NAME = st.text(st.characters(exclude_categories=["Cs", "Z", "C"], exclude_characters="/"), min_size=1, max_size=12)


@given(NAME, NAME, st.none() | st.integers(0, 999_999))
def test_lines_come_back(folder, file, number):
    videos = {}
    line = f"{folder}/{file}.avi" + (f" {number}" if number is not None else "")
    assert add_line(videos, line, 1, "train", "list line 1", ()) is None
    ((key, video),) = videos.items()
    assert key == (folder, file)
    assert (video.path, video.parts) == (f"{folder}/{file}.avi", {1: "train"})


@given(st.text())
def test_any_line_is_taken_or_refused(line):
    videos = {}
    assert (add_line(videos, line, 1, "test", "list line 1", ()) is None) == (len(videos) == 1)


@pytest.mark.parametrize("below", ["", "videos"])
def test_real_clips(real_clips, below):
    listing = list_ucf101(real_clips / "ucf101" / below)
    assert listing.classes == ("SoccerJuggling",)
    assert listing.subsets == ("fold1-train", "fold1-test")
    assert subsets(listing) == {"SoccerJuggling/v_SoccerJuggling_g23_c01.avi": ("fold1-train",)}
    assert listing.sources[0].location.stat().st_size > 10_000
