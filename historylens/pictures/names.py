"""Names of the pictures in an output folder: what each shows, and which ones a run has written.

Only what matches to the letter is a run's own: a user's `layer_5/attention_mine.png` is not.
"""

import re
from pathlib import Path
from typing import NamedTuple

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


class PictureFile(NamedTuple):
    """A picture of an analysis; what has no sample, rollout, step, layer or page has None."""

    path: Path
    kind: str  # of KINDS
    sample: int | None = None
    rollout: int | None = None
    step: int | None = None
    layer: int | None = None
    page: int | None = None


def pictures_in(out: str | Path) -> list[PictureFile]:
    """Those in an output folder, in the order of `KINDS` and of their numbers."""
    found = []
    for path in (path for form in FORMATS for path in Path(out).glob(f"**/*.{form}")):
        name = path.relative_to(out).with_suffix("").as_posix()
        for place, (kind, pattern) in enumerate(KINDS.items()):
            if match := re.fullmatch(pattern, name):
                numbers = {k: int(v) for k, v in match.groupdict().items() if v is not None}
                one = PictureFile(path, kind, **numbers)
                order = place, *(-1 if n is None else n for n in one[2:]), str(path)
                found.append((order, one))
    return [one for _, one in sorted(found)]
