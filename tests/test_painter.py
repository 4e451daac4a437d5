"""Pictures drawn by several processes are those drawn by one, and nothing is lost on the way."""

import os
import signal
import time

import pytest

from historylens.pictures import painter as module
from historylens.pictures.page import Page
from historylens.pictures.painter import Painter, drawing_processes


def write_process(path):
    time.sleep(0.02)
    path.write_text(str(os.getpid()))


def fail(path):
    raise ValueError("no\nbins")


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def draw_line(path):
    page = Page(300, 200, dpi=50)
    page.plot(40, 20, 200, 150).plot([0, int(path.stem), 1])
    page.save(path)


def write_title(path):
    page = Page(300, 200, dpi=50)
    page.heading(10, "日本", "שלום")
    page.save(path)


def draw_many(function, folder, n_pictures, n_processes, then=lambda: None):
    """How many pictures were said to be drawn, and the files."""
    folder.mkdir(exist_ok=True)
    said = []
    with Painter(n_processes, drawn=lambda: said.append("drawn")) as painter:
        for number in range(n_pictures):
            painter.draw(function, folder / f"{number}.png")
        then()
    return len(said), {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_the_same_bytes_however_many_processes_draw(tmp_path):
    one, three = (draw_many(draw_line, tmp_path / str(n), 5, n) for n in (1, 3))
    assert one == three
    assert one[0] == len(set(one[1].values())) == 5


def test_one_process_draws_here_at_once_and_several_elsewhere_more_than_may_wait(tmp_path):
    with Painter(1) as painter:
        painter.draw(write_process, tmp_path / "0.png")
        assert (tmp_path / "0.png").read_text() == str(os.getpid())
    n_drawn, files = draw_many(write_process, tmp_path, 4 * module.IN_FLIGHT, 2)
    assert n_drawn == len(files) == 4 * module.IN_FLIGHT
    assert str(os.getpid()).encode() not in files.values()


@pytest.mark.parametrize("places", [{0}, {9}, {2, 3, 6}])  # at the end, or while drawing
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


def test_an_error_is_a_note_and_one_elsewhere_does_not_wait(tmp_path, monkeypatch, capsys):
    for n_processes in (1, 2):
        with Painter(n_processes, "the numbers are there") as painter:
            (tmp_path / "gone.png").write_text("of an earlier run")
            painter.draw(fail, tmp_path / "gone.png")
        assert painter.n_drawn == 0
        assert not (tmp_path / "gone.png").exists()
        note = (
            f"note: {tmp_path / 'gone.png'} could not be drawn (ValueError: no bins); the numbers"
        )
        said = capsys.readouterr().err
        assert said.startswith(note)
        assert said.endswith("; the numbers are there\n")
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_processes", [1, 2])
def test_letters_that_the_font_lacks_are_boxes_without_a_word(tmp_path, capfd, n_processes):
    draw_many(write_title, tmp_path, 2, n_processes)
    assert capfd.readouterr().err == ""
