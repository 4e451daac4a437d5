"""Pictures drawn by several processes are those drawn by one, and nothing is lost on the way."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

import drawing
from attention import figures
from attention.metrics import SUMMARY_METRICS
from config import UserError
from drawing import Painter, drawing_processes


def draw_summaries(folder, n_processes, n_pictures=5):
    drawn = Counter()
    with Painter(n_processes, lambda: drawn.update(["picture"])) as painter:
        for layer in range(n_pictures):
            values = {name: [0.1, 0.2 + layer, 0.7] for name in SUMMARY_METRICS}
            even = dict.fromkeys(SUMMARY_METRICS, 0.5)
            painter.draw("summary", folder / f"{layer}.png", values, even, layer=layer, dpi=30)
    return drawn["picture"], {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_the_same_bytes_however_many_processes_draw(tmp_path):
    found = []
    for n_processes in (1, 3):
        folder = tmp_path / str(n_processes)
        folder.mkdir()
        found.append(draw_summaries(folder, n_processes))
    assert found[0] == found[1]
    assert found[0][0] == len(found[0][1]) == 5


def test_more_pictures_than_may_wait_are_all_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "IN_FLIGHT", 1)
    monkeypatch.setattr(figures, "lines", lambda path: Path(path).write_text(str(os.getpid())))
    with Painter(2) as painter:
        for number in range(20):
            painter.draw("lines", tmp_path / str(number))
            assert len(painter._waiting) <= 3
    processes = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 20
    assert str(os.getpid()) not in processes


def test_one_process_draws_at_once_and_here(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "lines", lambda path: Path(path).write_text(str(os.getpid())))
    with Painter(1) as painter:
        painter.draw("lines", tmp_path / "picture")
        assert (tmp_path / "picture").read_text() == str(os.getpid())


@pytest.mark.parametrize("n_processes", [1, 2])
def test_an_error_while_drawing_comes_through(tmp_path, monkeypatch, n_processes):
    def fail(path):
        raise ValueError("no such shape")

    monkeypatch.setattr(figures, "lines", fail)
    with pytest.raises(ValueError, match="no such shape"), Painter(n_processes) as painter:
        painter.draw("lines", tmp_path / "picture")


def draw_many(folder, n_pictures, then=lambda: None):
    with Painter(2) as painter:
        for number in range(n_pictures):
            painter.draw("lines", folder / str(number))
        then()


def test_a_killed_drawing_process_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "lines", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"was killed.*--num-figures"):
        draw_many(tmp_path, 20)


def test_an_error_elsewhere_does_not_wait_for_the_pictures(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("elsewhere")

    monkeypatch.setattr(drawing, "IN_FLIGHT", 50)
    monkeypatch.setattr(figures, "lines", lambda path: (time.sleep(0.05), path.touch()))
    with pytest.raises(RuntimeError, match="elsewhere"):
        draw_many(tmp_path, 80, fail)
    assert len(list(tmp_path.iterdir())) < 40


def test_few_pictures_or_no_fork_are_drawn_by_one_process(monkeypatch):
    monkeypatch.setattr(drawing.os, "sched_getaffinity", lambda _: range(5), raising=False)
    assert drawing_processes(drawing.MIN_PICTURES - 1) == 1
    assert drawing_processes(drawing.MIN_PICTURES) == 5
    monkeypatch.setattr(drawing.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert drawing_processes(1000) == drawing.MAX_PROCESSES
    monkeypatch.setattr(drawing.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert drawing_processes(1000) == 1
