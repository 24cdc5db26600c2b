"""The memory bank's benchmark runs, small, and prints its ratios and each rank's memory."""

import re
import sys
from pathlib import Path

import pytest

from tests.processes import run

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory_bank.py"


@pytest.mark.slow
def test_prints_ratios_and_memory_per_rank() -> None:
    small = ["--instances", "20000", "--negatives", "32", "--batch", "4", "--rounds", "1", "--threads", "1"]
    done = run(sys.executable, BENCHMARK, *small)
    ratios = re.search(r"AVID ratio (\d+\.\d\d) \(limit 0\.6\); AVID\+CMA ratio (\d+\.\d\d)", done.stdout)
    assert ratios is not None, done.stdout
    assert all(float(ratio) > 0 for ratio in ratios.groups())
    of_ranks = re.findall(r"^ +([124]) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, flags=re.MULTILINE)
    assert [row[0] for row in of_ranks] == ["1", "2", "4"]
    for ranks, bank, tensors, growth in of_ranks:
        # Two memories of 128 float32 numbers per instance, and 32 positives of 4 bytes.
        assert float(bank) == pytest.approx(20_000 / int(ranks) * 2 * 128 * 4 / 1e6, abs=0.06)
        assert float(tensors) == pytest.approx(20_000 / int(ranks) * (2 * 128 + 32) * 4 / 1e6, rel=0.02, abs=0.1)
        assert float(growth) > 0
