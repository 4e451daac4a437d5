"""`results.json`: what the arms of a comparison earned, written as soon as each is finished.

    results, note = open_results("figs/compression", fingerprint)
    results.add(Result(arm, returns, cost))     # on disk now, whole or not at all
    results.finish(summary)

The file names everything that its returns depend on. Where that is the same, finished arms are used
again; where it differs, the files of the earlier comparison are moved to a folder beside them.
"""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from historylens.common.files import in_the_way, writable_folder, write_json
from historylens.comparison.policy import Cost
from historylens.comparison.study import Arm, Result

SCHEMA_VERSION = 1
RESULTS, TABLE, CONFIRMATION = "results.json", "results.csv", "confirmation.json"
PICTURES = ("return_by_budget.png", "return_by_episode.png")
FILES = (RESULTS, TABLE, *PICTURES)


class ResultsFile:
    """A file of finished arms, taken up where it has the same fingerprint.

    Args:
        path: the file.
        fingerprint: plain values on which returns depend.

    Attributes:
        by_key: the finished arms, by their keys.
        why: why nothing was taken up; empty where something was.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.by_key: dict[str, Result] = {}
        self.why = self._read()

    def add(self, result: Result) -> None:
        """Keep a finished arm. What told of fewer arms goes."""
        for name in (TABLE, *PICTURES):
            (self.path.parent / name).unlink(missing_ok=True)
        self.by_key[result.arm.key] = result
        self._write({"complete": False})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the file with what the returns say."""
        self._write({"complete": True, "summary": summary})

    def _write(self, more: Mapping[str, Any]) -> None:
        head = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **more}
        arms = {key: _entry(result) for key, result in self.by_key.items()}
        write_json(self.path, head | {"arms": arms})

    def _read(self) -> str:
        if not self.path.is_file():
            return "without results.json"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            theirs = content["fingerprint"]
            if content["schema_version"] != SCHEMA_VERSION:
                return "of another version"
            mine = self.fingerprint
            differs = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
            by_key = {key: _result(entry) for key, entry in content["arms"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return "a damaged results.json"
        if differs:
            return f"other {', '.join(differs)}"
        self.by_key = by_key
        return ""


def open_results(out: str | Path, fingerprint: Mapping[str, Any]) -> tuple[ResultsFile, str]:
    """Take up what lies in `out`, or move it aside where it is of another comparison.

    Returns:
        The results, and what was found in the folder, in a line; empty where there was nothing.

    Raises:
        UserError: the folder cannot be written to.
    """
    with writable_folder(out) as folder:
        there = [folder / name for name in (*FILES, CONFIRMATION) if (folder / name).exists()]
        for path in there:
            if path.is_dir():
                raise in_the_way(folder, path)
        results = ResultsFile(folder / RESULTS, fingerprint)
        if not results.why:
            n = len(results.by_key)
            return results, f"{results.path} has {n} finished arms of these settings"
        if not there:
            return results, ""
        folders = (folder / f"earlier-{number}" for number in itertools.count(1))
        aside = next(each for each in folders if not each.exists())
        aside.mkdir()
        for path in there:
            os.replace(path, aside / path.name)
    return results, f"Results of another comparison ({results.why}) were in {out}: moved to {aside}"


def _entry(result: Result) -> dict[str, Any]:
    """A finished arm as plain values; whole rewards without a fraction."""
    cost, returns = asdict(result.cost), result.returns
    seconds = {name: cost.pop(name) for name in ("seconds_selecting", "seconds_model")}
    is_whole = (returns % 1 == 0).all()
    return {
        "strategy": result.arm.name,
        "budget": result.arm.n_keep,
        "returns": returns.astype(np.int64) if is_whole else returns,
        "cost": cost,
        "seconds": seconds,
    }


def _result(entry: Mapping[str, Any]) -> Result:
    arm, cost = Arm(entry["strategy"], entry["budget"]), Cost(**entry["cost"], **entry["seconds"])
    return Result(arm, np.array(entry["returns"], dtype=np.float64), cost)
