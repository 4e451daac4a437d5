"""Some dozen damaged files, each in a process of its own: `tests/fuzz_files.py` tries more.

FUZZ_CASES=400 python -m pytest -n 0 tests/test_fuzz_files.py
"""

import os
import sys

import fuzz_changes
import fuzz_files
import numpy as np
import pytest

N_CASES = int(os.environ.get("FUZZ_CASES", "12"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", fuzz_changes.CHANGES)
def test_a_damaged_file_ends_in_the_right_numbers_or_in_a_line(area):
    counts, bad = fuzz_files.run(N_CASES, seed=1, areas=[area], thorough=0.1)
    assert sum(counts.values()) == N_CASES
    assert not bad
    assert sum(n for (*_, how), n in counts.items() if how == "a line") > N_CASES / 5


@pytest.mark.parametrize(("work", "expected"), [
    (lambda: "digest", "numbers"),
    (lambda: [].pop(), "traceback"),
    (lambda: np.ones(2**40), "memory"),
    (lambda: os.abort(), "crashes"),
    (lambda: [None for _ in iter(int, 1)], "hangs"),
    (lambda: fuzz_files.agent.expect(False, "a line"), "a line"),
    (lambda: fuzz_files.agent.expect(False, "a\x1b[2J line"), "a line"),
    (lambda: sys.exit(print("error: a\x1b[2J line", file=sys.stderr) or 2), "a bad line"),
])  # fmt: skip
def test_the_ends_are_told_apart(tmp_path, monkeypatch, work, expected):
    monkeypatch.setattr(fuzz_files, "job", lambda *_: work())
    monkeypatch.setattr(fuzz_files, "MEMORY", 2**26 if expected == "hangs" else 2**30)
    how, *_ = fuzz_files.ended(tmp_path, tmp_path, False, seconds=1)
    assert how == expected if expected != "hangs" else how in ("hangs", "memory")
