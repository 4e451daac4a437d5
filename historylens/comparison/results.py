"""`results.json`: what the arms of a comparison earned, written as soon as each is finished.

    results = open_results("figs/compression", fingerprint)
    results.add(Result(arm, returns, cost))     # on disk now, whole or not at all

It names all that its returns depend on. Where that is the same, finished arms are used again; where
it differs or is damaged, what lies there is moved to a folder beside it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from historylens.common.errors import expect
from historylens.common.files import FORMATS, INDEX, in_the_way, set_aside, write_json
from historylens.comparison.policy import Cost
from historylens.comparison.study import Arm, Result

SCHEMA_VERSION = 1
RESULTS, TABLE, CONFIRMATION = "results.json", "results.csv", "confirmation.json"
BY_BUDGET, BY_EPISODE = "return_by_budget", "return_by_episode"  # pictures, a file a format
PICTURES = tuple(f"{name}.{form}" for form in FORMATS for name in (BY_BUDGET, BY_EPISODE))
FILES = (INDEX, *PICTURES, TABLE, RESULTS)  # those that a comparison may have


class ResultsFile:
    """A file of finished arms, taken up where it has the same fingerprint: plain values."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.by_key: dict[str, Result] = {}  # the finished arms
        self.why = self._read()  # why nothing was taken up; empty where something was
        self.found = ""  # what lay in the folder, in a line

    def add(self, result: Result) -> None:
        """Keep a finished arm. What told of fewer arms goes."""
        self.by_key[result.arm.key] = result
        self.write()
        for name in FILES[:-1]:
            (self.path.parent / name).unlink(missing_ok=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files beside it, where they are."""
        for name in names:
            self.path.with_name(name).unlink(missing_ok=True)

    def write(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write all arms, whole rewards without a fraction; once complete, what returns say."""
        arms, told = {}, {} if summary is None else {"summary": summary}
        for key, result in self.by_key.items():
            cost, returns = asdict(result.cost), result.returns
            seconds = {name: cost.pop(name) for name in ("seconds_selecting", "seconds_model")}
            arms[key] = {
                "strategy": result.arm.name,
                "budget": result.arm.n_keep,
                "returns": returns.astype(np.int64) if (returns % 1 == 0).all() else returns,
                "cost": cost,
                "seconds": seconds,
                **({"ended_early": result.n_early} if result.n_early else {}),
            }
        head = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint}
        write_json(self.path, head | {"complete": bool(told), **told, "arms": arms})

    def _read(self) -> str:
        if not self.path.exists():
            return f"without {self.path.name}"
        mine, by_key = self.fingerprint, {}
        shape = len(mine["goals"]), mine["seeds"], mine["episodes"]
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            theirs = content["fingerprint"]
            if content["schema_version"] != SCHEMA_VERSION:
                return "of another version"
            differs = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
            for key, entry in content["arms"].items():
                arm = Arm(entry["strategy"], entry["budget"])
                returns = np.array(entry["returns"], dtype=np.float64)
                cost = Cost(**entry["cost"], **entry["seconds"])
                by_key[key] = one = Result(arm, returns, cost, entry.get("ended_early", 0))
                numbers = [x for x in asdict(cost).values() if x is not None]
                is_fit = np.isfinite([*numbers, one.n_early, returns.sum()]).all()
                is_fit &= key == arm.key and bool(arm.method)
                expect(is_fit and (differs or returns.shape == shape), key)
        except Exception:  # whatever was done to it
            return f"a damaged {self.path.name}"
        self.by_key = {} if differs else by_key
        return f"other {', '.join(differs)}" if differs else ""


def open_results(folder: Path, fingerprint: Mapping[str, Any], name: str = RESULTS) -> ResultsFile:
    """Take up what lies in `folder`, else set it aside; UserError where it cannot be written to."""
    results = ResultsFile(folder / name, fingerprint)
    names = (name,) if name == CONFIRMATION else (CONFIRMATION, *FILES)
    there = [one for one in names if os.path.lexists(folder / one)]
    for path in (folder / one for one in there):
        if (path.is_dir() and path.suffix != ".json") or not os.access(path, os.W_OK):
            raise in_the_way(folder, path)
    if not results.why:
        n_found = len(results.by_key)
        results.found = f"{results.path} has {n_found} finished arms of these settings"
    elif there:
        were = f"Results of another comparison ({results.why}) were in {folder}"
        results.found = f"{were}: moved to {set_aside(folder, names)}"
    return results
