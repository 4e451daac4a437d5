"""`results.json`: what the arms of a comparison earned, written as soon as each is finished.

    kept = KeptResults.open("figs/compression", fingerprint)
    kept.add(arm, returns, cost)               # on disk now, whole or not at all
    kept.finish(summary)

The file names everything that its returns depend on. Where that is the same, finished arms are used
again; where it differs, the files of the earlier comparison are moved to a folder beside them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from acting.reading import Cost
from attention.files import write_json
from comparison.judgement import Arm
from output import in_the_way, writable_folder

SCHEMA_VERSION = 1
RESULTS, TABLE = "results.json", "results.csv"
PICTURES = ("return_by_budget.png", "return_by_episode.png")
CONFIRMATION = "confirmation.json"
FILES = (RESULTS, TABLE, *PICTURES)
CODE = (
    "compression/*.py", "acting/*.py", "darkroom.py", "model.py", "rollout.py",
    "comparison/task.py", "comparison/playing.py",
)  # fmt: skip


class KeptResults:
    """The content of `results.json` in an output folder.

    Attributes:
        arms: by the key of each finished arm, its returns, cost and seconds.
        note: what was found in the folder, in a line; empty where there was nothing.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], name: str = RESULTS) -> None:
        self.out, self.fingerprint, self.name = out, dict(fingerprint), name
        self.arms: dict[str, dict[str, Any]] = {}
        self.note = ""

    def confirming(self, fingerprint: Mapping[str, Any]) -> "KeptResults":
        """Runs that confirm an arm of these results, in a file beside them, taken up if there."""
        kept = KeptResults(self.out, fingerprint, CONFIRMATION)
        arms, _ = _matching(kept.out / CONFIRMATION, kept.fingerprint)
        kept.arms = arms or {}
        return kept

    @classmethod
    def open(cls, out: str | Path, fingerprint: Mapping[str, Any]) -> "KeptResults":
        """Take up what lies in `out`, or move it aside where it is of another comparison.

        Raises:
            UserError: the folder cannot be written to.
        """
        kept = cls(_writable(Path(out)), fingerprint)
        found = [kept.out / name for name in (*FILES, CONFIRMATION) if (kept.out / name).exists()]
        arms, why = _matching(kept.out / RESULTS, kept.fingerprint)
        if arms is not None:
            kept.arms = arms
            kept.note = f"{kept.out / RESULTS} has {len(arms)} finished arms of these settings"
        elif found:
            aside = _free_folder(kept.out)
            aside.mkdir()
            for path in found:
                os.replace(path, aside / path.name)
            kept.note = f"Results of another comparison ({why}) were in {out}: moved to {aside}"
        return kept

    def add(self, arm: Arm, returns: np.ndarray, cost: Cost) -> None:
        """Keep a finished arm: returns `(G, R, E)`. What told of fewer arms goes."""
        for name in (TABLE, *PICTURES):
            (self.out / name).unlink(missing_ok=True)
        numbers = asdict(cost)
        seconds = {name: value for name, value in numbers.items() if name.startswith("seconds")}
        self.arms[arm.key] = {
            "strategy": arm.name,
            "budget": arm.n_keep,
            "returns": _plain(returns),
            "cost": {name: value for name, value in numbers.items() if name not in seconds},
            "seconds": seconds,
        }
        self._write({"complete": False})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the file with what the returns say."""
        self._write({"complete": True, "summary": summary})

    def _write(self, more: Mapping[str, Any]) -> None:
        head = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint}
        write_json(self.out / self.name, head | dict(more) | {"arms": self.arms})


def code_digest() -> str:
    """Digest of the program's files that returns depend on: changed code plays anew."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _matching(
    path: Path, fingerprint: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]] | None, str]:
    """The arms in a file of the same fingerprint; else None and why not."""
    if not path.is_file():
        return None, "without results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, found, arms = (content[key] for key in ("schema_version", "fingerprint", "arms"))
        if version != SCHEMA_VERSION or not isinstance(arms, dict):
            return None, "of another version"
        for entry in arms.values():
            Cost(**entry["cost"], **entry["seconds"])
            np.array(entry["returns"], dtype=np.float64)
    except (ValueError, KeyError, TypeError):
        return None, "a damaged results.json"
    differs = [key for key in fingerprint | found if fingerprint.get(key) != found.get(key)]
    return (arms, "") if not differs else (None, f"other {', '.join(differs)}")


def _free_folder(out: Path) -> Path:
    number = 1
    while (out / f"earlier-{number}").exists():
        number += 1
    return out / f"earlier-{number}"


def _plain(returns: np.ndarray) -> list[Any]:
    """Nested lists; whole numbers without a fraction."""
    whole = np.asarray(returns, dtype=np.float64)
    return (whole.astype(np.int64) if (whole % 1 == 0).all() else whole).tolist()


def _writable(out: Path) -> Path:
    """Make the output folder and check that its files can be written."""
    with writable_folder(out):
        for name in (*FILES, CONFIRMATION):
            if (out / name).is_dir():
                raise in_the_way(out, out / name)
    return out
