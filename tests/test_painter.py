"""Pictures by one process or several are the same, after the numbers; one that fails is a note."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_quickly, files_of
from test_visualize_attention import make_run

from historylens.effects import MeasuredEffects
from historylens.pictures import painter as module
from historylens.pictures.metricplot import METRICS, course, summary
from historylens.pictures.page import Page
from historylens.pictures.painter import Painter, drawing_processes
from visualize_attention import main


def write_process(path):
    time.sleep(0.02)
    path.write_text(str(os.getpid()))


def fail(path, **_):
    raise ValueError("Too many bins\nfor data range")


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def write_title(path):
    page = Page(300, 200, dpi=50)
    page.heading(10, path.stem, "日本 שלום")  # letters that the font lacks
    page.plot(40, 80, 200, 90).plot([0, 1])
    page.save(path)


def draw_many(function, folder, n_pictures, n_processes, then=lambda: None):
    """How many pictures were said to be drawn, and the files."""
    folder.mkdir(exist_ok=True)
    said = []
    with Painter(n_processes, drawn=lambda: said.append("drawn")) as painter:
        for number in range(n_pictures):
            painter.draw(function, folder / f"{number}.png")
        then()
    return len(said), files_of(folder)


@pytest.mark.filterwarnings("error")
def test_pictures_are_the_same_bytes_by_any_processes_and_nothing_is_said(tmp_path, capfd):
    one, three = (draw_many(write_title, tmp_path / str(n), 4, n) for n in (1, 3))
    assert one == three
    assert one[0] == len(set(one[1].values())) == 4
    assert capfd.readouterr().err == ""


def test_one_process_draws_here_at_once_and_several_elsewhere_more_than_may_wait(tmp_path):
    with Painter(1) as painter:
        painter.draw(write_process, tmp_path / "0.png")
        assert (tmp_path / "0.png").read_text() == str(os.getpid())
    n_drawn, files = draw_many(write_process, tmp_path, 4 * module.IN_FLIGHT, 2)
    assert n_drawn == len(files) == 4 * module.IN_FLIGHT
    assert str(os.getpid()).encode() not in files.values()


@pytest.mark.parametrize("places", [{9}, {0, 3, 6}])  # at the end, or while drawing
def test_a_killed_drawing_process_costs_the_picture_that_killed_it(tmp_path, capsys, places):
    with Painter(2, "the numbers are there") as painter:
        for i in range(10):
            painter.draw(die if i in places else write_process, tmp_path / "made" / f"{i}.png")
    assert painter.n_drawn == 10 - len(places)
    drawn = {int(path.stem) for path in (tmp_path / "made").iterdir()}
    assert drawn == set(range(10)) - places
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(places)
    assert all("was killed" in one and "--num-figures" in one for one in notes)


def test_an_error_is_a_note_and_no_old_picture_stays(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gone.png"
    path.write_text("of an earlier run")
    with Painter(1, "the numbers are there") as painter:  # two: see below
        painter.draw(fail, path)
    assert painter.n_drawn == 0
    assert not path.exists()
    reason = "(ValueError: Too many bins for data range); the numbers are there"
    assert capsys.readouterr().err == f"note: {path} could not be drawn {reason}\n"
    monkeypatch.setattr(module, "IN_FLIGHT", 50)
    with pytest.raises(ZeroDivisionError):
        draw_many(write_process, tmp_path, 80, 2, then=lambda: 1 / 0)
    assert len(list(tmp_path.iterdir())) < 40


def test_few_pictures_or_no_fork_are_drawn_by_one_process(monkeypatch):
    for n_cores, n_processes in ((5, 5), (64, module.MAX_PROCESSES)):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, n=n_cores: range(n), False)
        assert drawing_processes(module.MIN_PICTURES - 1) == 1
        assert drawing_processes(module.MIN_PICTURES) == n_processes
    monkeypatch.setattr(module.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert drawing_processes(1000) == 1


@pytest.mark.usefixtures("few_effects")
def test_any_kind_of_picture_may_fail(tmp_path, tiny_config, monkeypatch, capsys):
    make_run(tmp_path / "checkpoints" / "tiny", tiny_config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MeasuredEffects, "ignores_history", False)  # so that curves are drawn
    monkeypatch.setattr(module, "drawing_processes", lambda n: 2)
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
def test_values_that_differ_by_rounding_only_are_drawn_as_one(tmp_path, n):
    sizes = dict(zip(METRICS, (1e-300, 1.0, 1e12, 0.0), strict=True))
    near = np.random.default_rng(n).integers(-3, 4, n)
    values = {name: size * (1 + 1e-16 * near) for name, size in sizes.items()}
    uniform = {name: size * (1 + 2e-16) for name, size in sizes.items()}
    summary(tmp_path / "a.png", values, uniform, layer=0, heads="heads 0 and 2", dpi=30)
    two = {name: np.stack([own, own]) for name, own in values.items()}
    course(tmp_path / "b.png", two, uniform, layers=[0, 1], heads="heads 0 and 2", dpi=30)
