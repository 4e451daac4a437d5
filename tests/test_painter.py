"""Pictures drawn by several processes are those drawn by one, and nothing is lost on the way."""

import os
import signal
import time
from collections import Counter

import numpy as np
import pytest

from historylens.common.errors import UserError
from historylens.metrics import SUMMARY_METRICS
from historylens.pictures import painter as module
from historylens.pictures.metricplot import summary
from historylens.pictures.painter import Painter, drawing_processes


def write_process(path):
    path.write_text(str(os.getpid()))


def fail(path):
    raise ValueError("no such shape")


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def draw_slowly(path):
    time.sleep(0.05)
    path.touch()


def draw_summaries(folder, n_processes, n_pictures=5):
    folder.mkdir()
    drawn = Counter()
    with Painter(n_processes, lambda: drawn.update(["picture"])) as painter:
        for layer in range(n_pictures):
            values = {name: np.array([0.1, 0.2 + layer, 0.7]) for name in SUMMARY_METRICS}
            even = dict.fromkeys(SUMMARY_METRICS, 0.5)
            painter.draw(summary, folder / f"{layer}.png", values, even, layer=layer, dpi=30)
    return drawn["picture"], {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_the_same_bytes_however_many_processes_draw(tmp_path):
    one, three = (draw_summaries(tmp_path / str(n), n) for n in (1, 3))
    assert one == three
    assert one[0] == len(one[1]) == 5


def draw_many(function, folder, n_pictures, n_processes=2, then=lambda: None):
    with Painter(n_processes) as painter:
        for number in range(n_pictures):
            painter.draw(function, folder / str(number))
        then()


def test_more_pictures_than_may_wait_are_all_drawn_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_FLIGHT", 1)
    draw_many(write_process, tmp_path, 20)
    processes = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 20
    assert str(os.getpid()) not in processes


def test_one_process_draws_at_once_and_here(tmp_path):
    with Painter(1) as painter:
        painter.draw(write_process, tmp_path / "picture")
        assert (tmp_path / "picture").read_text() == str(os.getpid())


@pytest.mark.parametrize("n_processes", [1, 2])
def test_an_error_while_drawing_comes_through(tmp_path, n_processes):
    with pytest.raises(ValueError, match="no such shape"):
        draw_many(fail, tmp_path, 1, n_processes)


def test_a_killed_drawing_process_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"was killed.*--num-figures"):
        draw_many(die, tmp_path, 20)


def test_an_error_elsewhere_does_not_wait_for_the_pictures(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("elsewhere")

    monkeypatch.setattr(module, "IN_FLIGHT", 50)
    with pytest.raises(RuntimeError, match="elsewhere"):
        draw_many(draw_slowly, tmp_path, 80, then=broken)
    assert len(list(tmp_path.iterdir())) < 40


def test_few_pictures_or_no_fork_are_drawn_by_one_process(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(5), raising=False)
    assert drawing_processes(module.MIN_PICTURES - 1) == 1
    assert drawing_processes(module.MIN_PICTURES) == 5
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert drawing_processes(1000) == module.MAX_PROCESSES
    monkeypatch.setattr(module.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert drawing_processes(1000) == 1
