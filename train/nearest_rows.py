"""Running, exact search for the k rows of a table that agree best with each of some query rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

__all__ = ["AgreementKind", "NearestRows", "Rows", "Tile", "choose_tile", "score_exactly"]

AgreementKind = Literal["consensus", "union", "video", "audio"]
Rows = tuple[Tensor, ...]
"""The same rows of one memory or of both, each ``[R, D]``."""

# What one pair of a query and a column may cost while a tile is searched, when every pair is a candidate.
_BYTES_PER_PAIR = 64
_MOST_COLUMNS = 8192
_FEWEST_ROWS = 256
_LARGEST_GROUP = 32
# New candidates per query that are merged at once; more come one round after the other.
_CANDIDATES_PER_ROUND = 256


@dataclass(frozen=True)
class Tile:
    """Queries and columns compared at once.

    Attributes:
        rows: Most queries.
        columns: Most columns, a multiple of ``group``.
        group: Neighbouring columns of which first only the best is looked at.
    """

    rows: int
    columns: int
    group: int


def choose_tile(block_bytes: int, num_columns: int, k: int) -> Tile:
    """Chooses the largest tile that needs at most ``block_bytes`` (but at least one query and 64 columns).

    Args:
        block_bytes: Upper bound for all temporary tensors, reached only if every pair is a candidate; an ordinary
            tile takes an eighth of it.
        num_columns: Columns there are.
        k: Matches wanted per query.
    """
    pairs = max(1, block_bytes // _BYTES_PER_PAIR)
    columns = min(_MOST_COLUMNS, max(64, pairs // _FEWEST_ROWS), max(1, num_columns))
    # The k-th best of a tile is at least the k-th best of its groups' maxima: a tight bound if groups are many.
    group = 1
    while group < _LARGEST_GROUP and 2 * group * 4 * k <= columns:
        group *= 2
    columns = -(-columns // group) * group
    return Tile(max(1, pairs // columns), columns, group)


def score_exactly(kind: AgreementKind, queries: Rows, columns: Rows) -> Tensor:
    """Agreement of pairs of rows in float64, the products added in a fixed order.

    It consists of element-wise operations alone, so that it depends on nothing but the two rows.

    Args:
        kind: How similarities of the modalities become one number.
        queries: Each ``[P, D]``.
        columns: Their partners, each ``[P, D]``.

    Returns:
        float64 ``[P]``.
    """
    similarities = []
    for query, column in zip(queries, columns, strict=True):
        terms = query.double() * column
        width = terms.shape[1]
        while width > 1:
            half = width // 2
            terms[:, :half] += terms[:, width - half : width]
            width -= half
        similarities.append(terms[:, 0])
    return _combine(kind, similarities)


def _combine(kind: AgreementKind, similarities: list[Tensor]) -> Tensor:
    """Agreement from the similarities of one or two modalities, written over the first."""
    first = similarities[0]
    if kind == "consensus":
        return torch.minimum(first, similarities[1], out=first)
    return torch.maximum(first, similarities[1], out=first) if kind == "union" else first


class NearestRows:
    """The k columns seen so far that agree best with each query; of equal ones the smaller number wins.

    Float32 matrix products only say which columns may be among the best: those within ``margin``, the most by which
    two of their entries can be wrongly ordered. Where that leaves open which columns are the k best, the columns in
    doubt are compared by :func:`score_exactly`. So the result depends neither on how the work is cut, nor in
    which order columns come, nor on the device.

    Args:
        queries: Rows to find matches for, each ``[n, D]``, any floating dtype.
        first: Number of the first query; a query never matches the column of its own number.
        k: Matches per query.
        kind: How similarities of the modalities become one number.
        margin: Twice the largest error of an entry of a float32 matrix product of these rows.
        tile: How much is compared at once.
    """

    def __init__(self, queries: Rows, first: int, k: int, kind: AgreementKind, margin: float, tile: Tile) -> None:
        self._queries, self._first, self._k, self._kind = queries, first, k, kind
        self._margin, self._tile = margin, tile
        size, device = (len(queries[0]), k), queries[0].device
        self._scores = torch.full(size, -math.inf, dtype=torch.float64, device=device)
        self._is_exact = torch.zeros(size, dtype=torch.bool, device=device)
        self._columns = torch.full(size, -1, dtype=torch.int64, device=device)
        self._buffers = [torch.empty(tile.rows * tile.columns, device=device) for _ in queries]

    def blocks(self) -> Iterator[range]:
        """Local numbers of the queries that are worked on together, in order."""
        num_queries = len(self._columns)
        for start in range(0, num_queries, self._tile.rows):
            yield range(start, min(start + self._tile.rows, num_queries))

    def add(self, block: range, columns: Rows, first_column: int) -> None:
        """Compares a block of queries with some columns.

        Args:
            block: One of :meth:`blocks`.
            columns: Columns not yet added, each ``[R, D]``.
            first_column: Number of the first of them.
        """
        queries = tuple(rows[block.start : block.stop].float() for rows in self._queries)
        for start in range(0, len(columns[0]), self._tile.columns):
            tile = tuple(rows[start : start + self._tile.columns] for rows in columns)
            scores = self._compare(queries, tile)
            self._exclude_self(scores, block, first_column + start, len(tile[0]))
            query, column, score = self._find_candidates(scores, self._scores[block.start : block.stop].amin(dim=1))
            column += start
            while len(query):
                query, column, score = self._merge(block, query, column, score, columns, first_column)

    def settle(self, block: range, columns: Rows, first_column: int) -> None:
        """Scores a block's matches among some columns exactly, after which these columns may be forgotten."""
        rows = slice(block.start, block.stop)
        among = (self._columns[rows] >= first_column) & (self._columns[rows] < first_column + len(columns[0]))
        query, place = (among & ~self._is_exact[rows]).nonzero(as_tuple=True)
        query = query + block.start
        self._scores[query, place] = self._score_pairs(query, self._columns[query, place] - first_column, columns)
        self._is_exact[query, place] = True

    def matches(self) -> Tensor:
        """Numbers of the k best columns of every query, ascending, int64 ``[n, k]``. To be called last."""
        for block in self.blocks():
            self._columns[block.start : block.stop] = self._columns[block.start : block.stop].sort(dim=1).values
        return self._columns

    def _compare(self, queries: Rows, columns: Rows) -> Tensor:
        """Approximate scores of a tile, ``[queries, columns]``, filled up with -inf to whole groups."""
        num_columns = len(columns[0])
        width = -(-num_columns // self._tile.group) * self._tile.group
        similarities = []
        for query, rows, buffer in zip(queries, columns, self._buffers, strict=True):
            filled = rows.float()
            if width > num_columns:
                filled = F.pad(filled, (0, 0, 0, width - num_columns))
            similarity = buffer[: len(query) * width].view(len(query), width)
            similarities.append(torch.mm(query, filled.T, out=similarity))
        scores = _combine(self._kind, similarities)
        scores[:, num_columns:] = -math.inf
        return scores

    def _exclude_self(self, scores: Tensor, block: range, first_column: int, num_columns: int) -> None:
        offset = self._first + block.start - first_column
        first, stop = max(0, -offset), min(len(block), num_columns - offset)
        if first < stop:
            own = torch.arange(first, stop, device=scores.device)
            scores[own, own + offset] = -math.inf

    def _find_candidates(self, scores: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of a tile that may be among the best: query, column (both from the tile's first), score."""
        group = self._tile.group
        maxima = scores.view(len(scores), -1, group).amax(dim=2)
        if maxima.shape[1] >= self._k and bool((lowest == -math.inf).any()):
            lowest = lowest.maximum(maxima.topk(self._k, dim=1).values[:, -1].double())
        floor = (lowest - self._margin).float().clamp(min=torch.finfo(torch.float32).min)
        query, place = (maxima >= floor[:, None]).nonzero(as_tuple=True)
        members = scores.view(-1, group)[query * maxima.shape[1] + place]
        hit, member = (members >= floor[query, None]).nonzero(as_tuple=True)
        return query[hit], place[hit] * group + member, members[hit, member]

    def _merge(
        self, block: range, query: Tensor, column: Tensor, score: Tensor, shard: Rows, first_column: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merges the first candidates of every query into the best so far; returns the others that are still good."""
        touched, which, counts = query.unique_consecutive(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[which]
        width = min(int(counts.max()), _CANDIDATES_PER_ROUND)
        rows, now = touched + block.start, place < width
        old = self._k
        scores = F.pad(self._scores[rows], (0, width), value=-math.inf)
        columns = F.pad(self._columns[rows], (0, width), value=-1)
        is_exact = F.pad(self._is_exact[rows], (0, width), value=False)
        scores[which[now], old + place[now]] = score[now].double()
        columns[which[now], old + place[now]] = first_column + column[now]
        picked = self._pick(rows, scores, columns, is_exact, shard, first_column)
        self._scores[rows] = scores.gather(1, picked)
        self._columns[rows] = columns.gather(1, picked)
        self._is_exact[rows] = is_exact.gather(1, picked)
        left = ~now & (score >= self._scores[rows].amin(dim=1)[which] - self._margin)
        return query[left], column[left], score[left]

    def _pick(
        self, rows: Tensor, scores: Tensor, columns: Tensor, is_exact: Tensor, shard: Rows, first_column: int
    ) -> Tensor:
        """Places of the k best of each row; scores that had to be made exact for that are changed in place."""
        best = scores.topk(self._k, dim=1)
        lowest = best.values[:, -1:]
        in_reach = (scores >= lowest - self._margin) & (scores > -math.inf)
        disputed = (in_reach.sum(dim=1) > self._k).nonzero()[:, 0]
        if not len(disputed):
            return best.indices
        unclear = in_reach[disputed] & (scores[disputed] <= lowest[disputed] + self._margin)
        row, place = (unclear & ~is_exact[disputed]).nonzero(as_tuple=True)
        row = disputed[row]
        scores[row, place] = self._score_pairs(rows[row], columns[row, place] - first_column, shard)
        is_exact[row, place] = True
        # Certain matches first, then by score, the smaller number first.
        certain = torch.where(scores[disputed] > lowest[disputed], math.inf, -math.inf)
        keys = torch.where(unclear, scores[disputed], certain)
        by_number = columns[disputed].argsort(dim=1)
        by_key = keys.gather(1, by_number).argsort(dim=1, descending=True, stable=True)[:, : self._k]
        best.indices[disputed] = by_number.gather(1, by_key)
        return best.indices

    def _score_pairs(self, query: Tensor, column: Tensor, shard: Rows) -> Tensor:
        """Exact scores of pairs of a query and a column, by their places among ours and in the shard."""
        size = max(1, self._tile.rows * self._tile.columns // shard[0].shape[1])
        scores = torch.empty(len(query), dtype=torch.float64, device=query.device)
        for start in range(0, len(query), size):
            part = slice(start, start + size)
            pairs = tuple(rows[query[part]] for rows in self._queries), tuple(rows[column[part]] for rows in shard)
            scores[part] = score_exactly(self._kind, *pairs)
        return scores
