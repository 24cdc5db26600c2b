from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.row_ranges import owned_rows, rows_per_chunk


@given(num_rows=st.integers(0, 10**7), world_size=st.integers(1, 300))
def test_rows_are_divided_without_gap_and_in_whole_chunks(num_rows, world_size):
    ranges = [owned_rows(num_rows, world_size, rank) for rank in range(world_size)]
    assert ranges[0].start == 0
    assert ranges[-1].stop == num_rows
    assert all(one.stop == other.start for one, other in pairwise(ranges))
    chunk = rows_per_chunk(num_rows, world_size)
    assert 1 <= chunk <= 65_536
    assert all(rows.start % chunk == 0 for rows in ranges if rows)
    # No rank owns more than its share, rounded up to whole chunks of nearly equal size.
    most = max(map(len, ranges))
    share = -(-num_rows // world_size)
    assert share <= most <= share + -(-share // 65_536)


def test_by_hand():
    assert [len(owned_rows(61, 4, rank)) for rank in range(4)] == [16, 16, 16, 13]
    assert [len(owned_rows(3, 4, rank)) for rank in range(4)] == [1, 1, 1, 0]
    assert owned_rows(1_784_108, 64, 63) == range(27_877 * 63, 1_784_108)
