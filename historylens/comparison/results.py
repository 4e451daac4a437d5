"""`results.json`: what the arms of a comparison earned, written block of runs by block.

    ResultsFile(folder, fingerprint).add(Result(arm, returns, cost))  # on disk now

A block is an arm's runs of some seeds. Where all is the same that its returns depend on, it is
used again; where that differs or the file is damaged, what lies there is moved aside.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from historylens.common import files
from historylens.common.errors import expect
from historylens.common.settings import MOST
from historylens.common.text import counted
from historylens.comparison.policy import Cost
from historylens.comparison.study import Arm, Result

SCHEMA_VERSION = 2
RESULTS, CONFIRMATION = files.NUMBERS["comparison"][0], "confirmation.json"
DRAWN = ("return_by_budget", "return_by_episode")  # pictures, a file a format
PICTURES = [f"{name}.{form}" for form in files.FORMATS for name in DRAWN]
FILES = (files.INDEX, *PICTURES, "results.csv", RESULTS)  # those that a comparison may have


class ResultsFile:
    """A file of finished blocks, taken up where it has the same fingerprint, else set aside.

    UserError: the folder cannot be written to, or an analysis wrote there.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], name: str = RESULTS) -> None:
        files.expect_no_results(folder, "analysis")
        self.path, self.fingerprint = folder / name, dict(fingerprint)
        self.blocks: dict[tuple[str, int], Result] = {}  # by the key of the arm and the first seed
        self.found = ""  # what lay in the folder, in a line
        self.why = self._read()  # why nothing was taken up; empty where something was
        names = (name,) if name == CONFIRMATION else (CONFIRMATION, *FILES)
        there = [folder / one for one in names if os.path.lexists(folder / one)]
        for path in there:
            if (path.is_dir() and path.suffix != ".json") or not os.access(path, os.W_OK):
                raise files.in_the_way(folder, path)
        if not self.why:
            n_arms = len({key for key, _ in self.blocks})
            has = f"{counted(len(self.blocks), 'block')} of runs of {counted(n_arms, 'arm')}"
            self.found = f"{self.path} has {has} of these settings"
        elif there:
            were = f"Files that are not of this comparison ({self.why}) were in {folder}"
            self.found = f"{were}: moved to {files.set_aside(folder, names)}"

    def add(self, result: Result) -> None:
        """Keep a finished block."""
        self.blocks[result.arm.key, result.first] = result
        self.write()

    def of(self, arm: Arm, n_seeds: int) -> Result:
        """What an arm earned in its first `n_seeds` runs of each goal, which are all there."""
        firsts = [first for first, _ in self.fingerprint["blocks"] if first < n_seeds]
        parts = [self.blocks[arm.key, first] for first in firsts]
        returns = np.concatenate([part.returns for part in parts], axis=1)
        n_early = sum(part.n_early for part in parts)
        return Result(arm, returns, Cost.sum([part.cost for part in parts]), n_early)

    def write(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write all blocks and what complete ones say; without it, what told of fewer goes."""
        arms, told = {}, {} if summary is None else {"summary": summary}
        for (key, first), block in sorted(self.blocks.items()):
            cost, returns = asdict(block.cost), block.returns
            seconds = {name: cost.pop(name) for name in ("seconds_selecting", "seconds_model")}
            whole = returns.astype(np.int64)  # without a fraction
            entry = {"first_seed": first, "returns": whole if (returns == whole).all() else returns}
            entry |= {"cost": cost, "seconds": seconds}
            entry |= {"ended_early": block.n_early} if block.n_early else {}
            arm = {"strategy": block.arm.name, "budget": block.arm.n_keep, "blocks": []}
            arms.setdefault(key, arm)["blocks"].append(entry)
        head = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint}
        head |= {"digest": _digest(self.blocks), "complete": bool(told)}
        files.write_atomically(self.path, {**head, **told, "arms": arms})
        for name in () if told else FILES[:-1]:
            self.path.with_name(name).unlink(missing_ok=True)

    def _read(self) -> str:
        if not self.path.exists():
            return f"without {self.path.name}"
        mine, blocks, stops = self.fingerprint, {}, dict(self.fingerprint["blocks"])
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            theirs = content["fingerprint"]
            if content["schema_version"] != SCHEMA_VERSION:
                return "of another version"
            differs = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
            arms = content["arms"].items()
            for key, told, entry in [(key, x, one) for key, x in arms for one in x["blocks"]]:
                arm = Arm(told["strategy"], told["budget"])
                first, returns = entry["first_seed"], np.array(entry["returns"], dtype=np.float64)
                cost = Cost(**entry["cost"], **entry["seconds"])
                one = Result(arm, returns, cost, entry.get("ended_early", 0), first)
                numbers = [x for x in asdict(cost).values() if x is not None]
                is_fit = np.abs([*numbers, one.n_early, *returns.flat]).max() <= MOST  # NaN is not
                is_fit &= key == arm.key and bool(arm.method)
                shape = len(mine["goals"]), stops.get(first, 0) - first, mine["episodes"]
                expect(is_fit and (differs or returns.shape == shape), key)
                blocks[key, first] = one
            found = _digest(blocks)
            expect(content.get("digest", found) == found, "its digest")  # earlier ones have none
        except Exception:  # whatever was done to it
            return f"a damaged {self.path.name}"
        self.blocks = {} if differs else blocks
        return f"other {', '.join(differs)}" if differs else ""


def _digest(blocks: Mapping[tuple[str, int], Result]) -> str:
    """SHA-256 of all that follows from the settings: measured times do not."""
    sha = hashlib.sha256()
    for (key, first), one in sorted(blocks.items()):
        cost = [(k, v) for k, v in asdict(one.cost).items() if not k.startswith("seconds")]
        numbers = [(k, None if v is None else float(v)) for k, v in cost]
        sha.update(repr((key, first, one.n_early, one.returns.shape, numbers)).encode())
        sha.update(one.returns.astype(np.float64).tobytes())
    return sha.hexdigest()
