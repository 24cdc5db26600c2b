from pathlib import PurePosixPath

from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.sources.annotated import ending_of, stem

NAME = st.text(st.sampled_from("aB.-_ ü"), min_size=1).filter(lambda name: name not in (".", ".."))


@given(st.lists(NAME, min_size=1))
def test_endings_are_those_of_pathlib(parts):
    name = "/".join(parts)
    assert (stem(name), ending_of(name)) == (PurePosixPath(name).stem, PurePosixPath(name).suffix.lower())
