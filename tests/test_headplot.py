"""The picture of heads: each head's numbers stand in its row, whatever their number and texts."""

from unittest import mock

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from test_pictures import axes_of

from historylens.pictures import effectplot
from historylens.pictures.effectplot import MAX_ROWS, ROLE, head_effects
from historylens.pictures.page import FAINT, Page, text_width

KINDS = ("mean", "other-task")


def made(n_layers=2, n_heads=3, kinds=KINDS, text="98% on the latest quarter, evenly 24%"):
    """Entries of heads and of whole layers, no two with the same effect, in no order of it."""
    places = [(layer, head) for layer in range(n_layers) for head in (*range(n_heads), "all")]
    effects = iter(np.random.default_rng(0).permutation(2 * len(places)) / 100 + 0.01)
    heads = []
    for layer, head in places:
        entry = {"layer": layer, "head": head, "role": {"text": f"{text} {layer}-{head}"}}
        for kind in KINDS:
            kl = next(effects)
            entry |= {kind: {"kl": kl, "kl_interval": [kl / 2, 2 * kl]}} if kind in kinds else {}
        heads.append(entry)
    return heads


def words_of(heads):
    """Places of the texts of a picture, by text and size."""
    with mock.patch.object(Page, "text") as text:
        axes_of(head_effects, heads, 32, dpi=50)
    return {call.args[2]: call.args for call in text.call_args_list}


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:]])
@pytest.mark.parametrize(("n_layers", "n_heads"), [(1, 1), (2, 3)])
def test_each_row_shows_the_effect_of_its_head_in_each_panel(kinds, n_layers, n_heads):
    heads = made(n_layers, n_heads, kinds)
    panels, words = axes_of(head_effects, heads, 32, dpi=50), words_of(heads)
    assert [axes.get_title(loc="left") for axes in panels] == [effectplot.PANELS[k] for k in kinds]
    for axes, kind in zip(panels, kinds, strict=True):
        lines = [line for line in axes.lines if line.get_color() != "#dddddd"]
        for row, (one, bar, dot) in enumerate(zip(heads, lines[::2], lines[1::2], strict=True)):
            name = f"layer {one['layer']} {'' if one['head'] == 'all' else 'head '}{one['head']}"
            assert bar.get_xydata().tolist() == [[x, row] for x in one[kind]["kl_interval"]]
            assert dot.get_xydata().tolist() == [[one[kind]["kl"], row]]
            assert (to_hex(dot.get_color()) == FAINT) == (one["head"] == "all")
            assert words[name][1] == effectplot.HEADS_TOP + effectplot.HEAD_ROW * (row + 0.5)
            assert (one["role"]["text"] in words) == (one["head"] != "all")
        assert axes.get_ylim() == (len(heads) - 0.5, -0.5)
        assert axes.get_xlim() == panels[0].get_xlim()


def test_of_100_heads_those_that_act_most_are_drawn_in_their_order_and_the_picture_says_so():
    heads, with_heading = made(10, 10), mock.patch.object(Page, "heading")
    with with_heading as heading:
        panel = axes_of(head_effects, heads, 32, dpi=50)[1]
    shown = [line.get_xdata()[0] for line in panel.lines if line.get_marker() in ("o", "D")]
    effects = [one["other-task"]["kl"] for one in heads]
    assert shown == [kl for kl in effects if kl >= sorted(effects)[-MAX_ROWS]]
    assert f"The {MAX_ROWS} of 110 rows with the largest effect" in heading.call_args.args[2]


@pytest.mark.parametrize(
    "text", ["wide " * 30, "W" * 90, "59% on one, evenly 1%; " * 4], ids=["words", "word", "parts"]
)
def test_long_role_texts_stay_in_their_column_and_row(text):
    roles = [args for args in words_of(made(1, 3, text=text)).values() if args[0] == ROLE][1:]
    assert roles
    for x, y, shown, size in roles:
        assert x + text_width(shown, size) <= effectplot.PANEL
        offset = (y - effectplot.HEADS_TOP) % effectplot.HEAD_ROW
        assert size / 2 < offset < effectplot.HEAD_ROW - size / 2
        assert shown.endswith("…") == (";" not in text)


def test_no_effect_at_all_is_drawn_in_the_size_of_dpi(tmp_path):
    path, heads = tmp_path / "a.png", made(1, 2)
    head_effects(path, heads, 32, dpi=50)
    size = Image.open(path).size
    for one in heads:
        one |= {kind: {"kl": 0.0, "kl_interval": [0.0, 0.0]} for kind in KINDS}
    head_effects(path, heads, 1, dpi=100)
    assert Image.open(path).size == pytest.approx([2 * side for side in size], abs=2)
    ticks = axes_of(head_effects, heads, 1, dpi=50)[0].get_xticklabels()
    assert {"0", "0.01"} <= {tick.get_text() for tick in ticks}
