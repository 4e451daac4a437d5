"""Numbers are written before pictures, and a picture that cannot be drawn costs only itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_visualize_attention import files_of, make_run

from historylens.analysis import main as historylens
from historylens.effects import MeasuredEffects
from historylens.pictures import painter
from historylens.pictures.metricplot import METRICS, course, summary
from historylens.pictures.painter import Painter
from visualize_attention import main

ONE_HOT = '''
import numpy as np
import torch
from torch import nn
from historylens import Decision


class Model(nn.Module):
    """Its one head attends to the token of the highest state it may see, and to no other."""

    def forward(self, states):
        x = torch.cat([states, torch.full((len(states), 1, 1), -9.0)], 1)
        scores = 1e4 * x.swapaxes(1, 2).expand(-1, x.shape[1], -1)
        visible = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        zeros = torch.zeros(len(x), 1, x.shape[1], 1)
        mask = torch.where(visible, scores, -torch.inf)[:, None]
        y = nn.functional.scaled_dot_product_attention(zeros, zeros, x[:, None], attn_mask=mask)
        return torch.cat([y[:, 0, -1], -y[:, 0, -1]], -1)


def load():
    return Model()


def samples(n, seed):
    rng = np.random.default_rng(seed)
    for i in range(n):
        yield Decision(states=rng.normal(size=(SIZE, 1)), actions=np.zeros(SIZE, int),
                       rewards=np.zeros(SIZE), query_state=np.zeros(1))


def act(model, history):
    return model(history.states.float())
'''
SMALL = ["--num-samples", "3", "--dpi", "40"]


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch):
    make_run(tmp_path / "checkpoints" / "tiny", tiny_config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MeasuredEffects, "ignores_history", False)  # so that curves are drawn
    return tmp_path


@pytest.mark.parametrize("size", [7, 30, 99])
def test_values_that_differ_by_rounding_only_are_drawn_as_one(size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("one_hot.py").write_text(ONE_HOT.replace("SIZE", str(size)))
    historylens(["--adapter", "one_hot.py", "--num-samples", "40", "--num-figures", "1"])
    assert "could not be drawn" not in capsys.readouterr().err
    assert {"metrics.json", "layer_0/attention_summary_layer0.png"} <= set(
        files_of(Path("figs/attention"))
    )


def fail(path, *args, **kwargs):
    raise ValueError("Too many bins\nfor data range")


def kinds_of_pictures(monkeypatch):
    """Every function that the command hands to the painter, by name, and what it drew."""
    drew, real = {}, Painter.draw

    def spied(self, function, path, *args, **kwargs):
        drew.setdefault(function, []).append(path)
        real(self, function, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "draw", spied)
        main([*SMALL, "--out", "whole"])
    return drew


def break_one(patch, broken, how):
    real = Painter.draw

    def draw(self, function, path, *args, **kwargs):
        function = how if function is broken else function
        real(self, function, path, *args, **kwargs)

    patch.setattr(Painter, "draw", draw)


def test_any_kind_of_picture_may_fail_and_is_told_while_all_else_is_drawn(
    home, monkeypatch, capsys
):
    monkeypatch.setattr(painter, "drawing_processes", lambda n: 2)  # one: see test_painter
    drew = kinds_of_pictures(monkeypatch)
    names = {function.__name__ for function in drew}
    assert names == {"heatmap", "line_plot", "summary", "course", "deletion_curves"}
    whole = files_of(Path("whole"))
    capsys.readouterr()
    for broken, paths in drew.items():
        out = Path(broken.__name__)
        lost = {path.relative_to("whole").as_posix() for path in paths}
        with monkeypatch.context() as patch:
            break_one(patch, broken, fail)
            main([*SMALL, "--out", str(out)])
        said = capsys.readouterr()
        left = {name: content for name, content in whole.items() if name not in lost}
        found = files_of(out)
        assert set(found) == set(left)
        same = ("metrics.json", *lost)
        assert all(found[name] == left[name] for name in left if name not in same)
        notes = [line for line in said.err.splitlines() if line.startswith("note:")]
        reason = "(ValueError: Too many bins); all numbers are in"
        assert sorted(notes) == sorted(
            f"note: {out / name} could not be drawn {reason} {out / 'metrics.json'}"
            for name in lost
        )
        n_pictures = sum(name.endswith(".png") for name in left)
        assert f"\n{n_pictures} pictures in {out}/" in said.out
        assert ("deletion_curves.png" in said.out) == ("deletion_curves.png" in left)


def test_numbers_are_written_before_the_first_picture_and_after_its_effects(home, monkeypatch):
    there = []

    def look(self, function, path, *args, **kwargs):
        content = json.loads(Path("figs/attention/metrics.json").read_text())
        there.append((bool(content["effects"]["strategies"]), content["drawn"]["layers"].keys()))
        assert Path("figs/attention/metrics.csv").exists()

    monkeypatch.setattr(Painter, "draw", look)
    main(SMALL)
    assert len(there) == 3 * 2 * 2 + 2 + 2
    assert all(one == (True, {"0", "1"}) for one in there)


def test_a_value_as_good_as_its_uniform_one_is_drawn(tmp_path):
    for size in (0.0, 1e-300, 1.0, 1e12):
        for n in (2, 400):
            rng = np.random.default_rng(n)
            values = {name: size * (1 + 1e-16 * rng.integers(-3, 4, n)) for name in METRICS}
            uniform = dict.fromkeys(METRICS, size * (1 + 2e-16))
            summary(tmp_path / "a.png", values, uniform, layer=0, dpi=30)
            two = {name: np.stack([own, own]) for name, own in values.items()}
            course(tmp_path / "b.png", two, uniform, layers=[0, 1], dpi=30)
