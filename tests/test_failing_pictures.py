"""Numbers are written before pictures, and a picture that cannot be drawn costs only itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_quickly, files_of
from test_visualize_attention import make_run

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


@pytest.mark.parametrize("size", [7, 30, 99])
def test_values_that_differ_by_rounding_only_are_drawn_as_one(size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("one_hot.py").write_text(ONE_HOT.replace("SIZE", str(size)))
    few = ["--num-figures", "0", "--num-effects", "0", "--dpi", "20", "--device", "cpu"]
    historylens(["--adapter", "one_hot.py", "--num-samples", "40", *few])
    assert "could not be drawn" not in capsys.readouterr().err
    assert {"metrics.json", "layer_0/attention_summary_layer0.png"} <= set(
        files_of(Path("figs/attention"))
    )


def fail(path):
    raise ValueError("Too many bins\nfor data range")


@pytest.mark.usefixtures("few_effects")
def test_any_kind_of_picture_may_fail_and_is_told_while_all_else_is_drawn_after_the_numbers(
    tmp_path, tiny_config, monkeypatch, capsys
):
    make_run(tmp_path / "checkpoints" / "tiny", tiny_config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MeasuredEffects, "ignores_history", False)  # so that curves are drawn
    monkeypatch.setattr(painter, "drawing_processes", lambda n: 2)  # one: see test_painter
    real, lost, there, found = Painter.draw, {}, [], {}

    def draw(self, function, path, *args, **kwargs):  # the first picture of a kind fails
        content = json.loads((out / "metrics.json").read_text())
        there.append((bool(content["effects"]["strategies"]), content["drawn"]["layers"].keys()))
        assert (out / "metrics.csv").exists()
        is_lost = lost.setdefault(function.__name__, path.name) == path.name and out.name == "some"
        real(self, fail if is_lost else draw_quickly, path)

    monkeypatch.setattr(Painter, "draw", draw)
    for out in (Path("all"), Path("some")):
        flags = ["--num-samples", "3", "--num-figures", "1", "--dpi", "20", "--device", "cpu"]
        main([*flags, "--out", str(out)])
        found[out.name], said = files_of(out), capsys.readouterr()
        n_pictures = sum(name.endswith(".png") for name in found[out.name])
        assert f"\n{n_pictures} pictures in {out}/" in said.out
        assert ("deletion_curves.png" in said.out) == (out.name == "all")
    assert there == [(True, {"0", "1"})] * 2 * (2 * 2 + 1 + 2 + 3)
    effects = {"deletion_curves", "head_effects"}
    assert lost.keys() == {"heatmap", "line_plot", "room_map", "summary", "course", *effects}
    names = {name for name in found["all"] if Path(name).name in lost.values()}
    left = {name: found["all"][name] for name in found["all"].keys() - names}
    own = {name: left[name] for name in ("metrics.json", "index.html")}  # of folder and pictures
    assert found["some"] | own == left
    reason = "(ValueError: Too many bins for data range); all numbers are in some/metrics.json"
    notes = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert sorted(notes) == sorted(f"note: some/{n} could not be drawn {reason}" for n in names)


@pytest.mark.parametrize("n", [2, 400])
def test_a_value_as_good_as_its_uniform_one_is_drawn(tmp_path, n):
    sizes = dict(zip(METRICS, (1e-300, 1.0, 1e12, 0.0), strict=True))
    near = np.random.default_rng(n).integers(-3, 4, n)
    values = {name: size * (1 + 1e-16 * near) for name, size in sizes.items()}
    uniform = {name: size * (1 + 2e-16) for name, size in sizes.items()}
    summary(tmp_path / "a.png", values, uniform, layer=0, dpi=30)
    two = {name: np.stack([own, own]) for name, own in values.items()}
    course(tmp_path / "b.png", two, uniform, layers=[0, 1], dpi=30)
