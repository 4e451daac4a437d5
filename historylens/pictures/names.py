"""Names of the pictures in an output folder: what each shows, and which ones a run has written.

    for one in pictures_in("figs/attention"):
        one.path, one.kind, one.layer, one.sample

Only what matches to the letter is a run's own: a user's `layer_5/attention_mine.png` is not.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from historylens.common.files import FORMATS

_LAYER, _OF_LAYER = r"layer_(?P<layer>\d+)", r"_layer(?P=layer)"
_PAGE = r"(?:_page(?P<page>\d+))?"
_ROLLOUT, _STEP = r"trajectory_(?P<rollout>\d+)", r"_timestep(?P<step>\d+)"
KINDS = {  # in the order in which they are shown; patterns of paths below the folder
    "learning": "attention_over_learning",
    "layers": "attention_layers",
    "deletion": "deletion_curves",
    "heads": "head_effects",
    "map": r"attention_map_sample(?P<sample>\d+)",
    "heatmap": rf"{_LAYER}/attention_heatmap_sample(?P<sample>\d+){_OF_LAYER}{_PAGE}",
    "lines": rf"{_LAYER}/attention_lines_sample(?P<sample>\d+){_OF_LAYER}",
    "summary": rf"{_LAYER}/attention_summary{_OF_LAYER}",
    "time": rf"{_ROLLOUT}/attention_over_time",
    "step heatmap": rf"{_ROLLOUT}/{_LAYER}/attention_heatmap{_STEP}{_OF_LAYER}{_PAGE}",
    "step lines": rf"{_ROLLOUT}/{_LAYER}/attention_lines{_STEP}{_OF_LAYER}",
}


@dataclass(frozen=True)
class PictureFile:
    """A picture of an analysis; what has no layer, sample, rollout, step or page has None."""

    path: Path
    kind: str  # of KINDS
    layer: int | None = None
    sample: int | None = None
    rollout: int | None = None
    step: int | None = None
    page: int | None = None


def pictures_in(out: str | Path) -> list[PictureFile]:
    """Those in an output folder, in the order of `KINDS` and of their numbers."""
    out, found = Path(out), []
    for path in (p for form in FORMATS for p in out.glob(f"**/*.{form}")):
        for kind, pattern in KINDS.items():
            if match := re.fullmatch(pattern, path.relative_to(out).with_suffix("").as_posix()):
                numbers = {k: int(v) for k, v in match.groupdict().items() if v is not None}
                found.append(PictureFile(path, kind, **numbers))
    order = list(KINDS)

    def place(one: PictureFile) -> tuple:
        numbers = one.sample, one.rollout, one.step, one.layer, one.page
        return order.index(one.kind), *(-1 if n is None else n for n in numbers), str(one.path)

    return sorted(found, key=place)
