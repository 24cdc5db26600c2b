"""Which rows of a large table (memories, features) belong to which rank."""

__all__ = ["owned_rows", "rows_per_chunk"]

_MOST_ROWS_PER_CHUNK = 65_536


def rows_per_chunk(num_rows: int, world_size: int) -> int:
    """Rows of one chunk of a table in storage: every rank's range is whole chunks, so that ranks write side by side."""
    share = -(-num_rows // world_size)
    chunks = -(-share // _MOST_ROWS_PER_CHUNK)
    return max(1, -(-share // max(1, chunks)))


def owned_rows(num_rows: int, world_size: int, rank: int) -> range:
    """A rank's contiguous range of rows.

    All ranks own the same number but the last ones, which own what is left, perhaps nothing.

    Args:
        num_rows: N, of the whole table.
        world_size: number of ranks.
        rank: from 0.
    """
    chunk = rows_per_chunk(num_rows, world_size)
    chunks = -(-num_rows // chunk)
    share = -(-chunks // world_size) * chunk
    return range(min(rank * share, num_rows), min((rank + 1) * share, num_rows))
