"""Whatever becomes of disk, console, processes and earlier files: one line, and nothing is lost."""

import contextlib
import errno
import importlib
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_kills
from apart import ended, plain_files, run_apart, started
from conftest import refused
from test_kills import COMMANDS, TRAINING

import compare_compression
import historylens.common
import train
import visualize_attention
from ad.training import Settings
from historylens.common import processes
from historylens.common.batches import expect_memory
from historylens.common.errors import UserError, run_command, undivided
from historylens.common.files import staged, writable_folder, write_atomically
from historylens.pictures import painter, prepare_output
from historylens.pictures.painter import Painter

DEAD = 4_194_303  # a number that no process has
home = test_kills.home


@pytest.fixture
def disk(home):
    """Mounts a disk of some size below the home; gives the folder."""
    folder = home / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def filled(folder):
    with (folder / "rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))


@pytest.mark.parametrize(("name", "options"), [
    *((name, "size=4k") for name in COMMANDS), ("analysis", "size=8m,nr_inodes=3"),
])  # fmt: skip
def test_a_disk_too_small_ends_in_a_line_that_names_the_file(home, disk, name, options):
    main, argv, flag = COMMANDS[name]
    folder = disk(options)
    end = run_apart(main, [*argv, flag, "disk/out"], home)
    assert (end.code, len(end.told)) == (2, 1)
    assert re.match(r"error: .*disk/out.*No space left on device", end.told[0])
    assert all(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["analysis", "comparison"])
def test_a_full_disk_leaves_earlier_results_whole(home, disk, name):
    main, argv, flag = COMMANDS[name]
    folder = disk("size=2m")
    assert run_apart(main, [*argv, flag, "disk/out"], home).code == 0
    filled(folder)
    before = plain_files(folder)
    more = ["--seed=1"] if name == "analysis" else ["--budgets", "3", "4"]
    end = run_apart(main, [*argv, *more, flag, "disk/out"], home)
    assert (end.code, len(end.told)) == (2, 1)
    assert plain_files(folder) == before


def test_a_training_whose_picture_has_no_room_goes_on(home, disk):
    folder = disk("size=64k")
    (folder / "training").mkdir()
    filled(folder)
    end = run_apart(train.main, [*TRAINING, "--figs=disk"], home)
    assert (end.code, len(end.told)) == (2, 1)
    assert run_apart(train.main, [*TRAINING, "--resume"], home).code == 0
    assert (home / "figs/training/AD-darkroom-seed0.png").exists()
    assert not (home / "checkpoints/AD-darkroom-seed0/resume.pt").exists()


def test_files_that_belong_together_are_renamed_after_the_block(tmp_path):
    one, other = tmp_path / "a.json", tmp_path / "b.csv"
    write_atomically(one, "before")

    def write_half(file):
        file.write(b"half")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError), staged({one: {"x": 1}, other: ["1\n"]}):
        raise RuntimeError
    with pytest.raises(RuntimeError, match="halfway"), staged({one: write_half}):
        raise AssertionError
    assert plain_files(tmp_path) == {"a.json": b"before"}
    with staged({one: {"x": np.float64(1)}, other: ["1\n", "2\n"]}):
        assert not other.exists()
    assert plain_files(tmp_path) == {"a.json": b'{"x": 1.0}\n', "b.csv": b"1\n2\n"}


def test_only_what_dead_processes_left_is_swept(tmp_path):
    (tmp_path / "layer_0").mkdir()
    gone = [f".a %b c.json.{DEAD}.tmp", f".write-test-{DEAD}", f"layer_0/.a_b0.png.{DEAD}.tmp"]
    stay = [f".a.json.{os.getppid()}.tmp", ".mine.tmp", f".mine.{DEAD}.tmp", f"a.json.{DEAD}",
            f"layer_0/.a.png.{DEAD}.tmp.bak"]  # fmt: skip
    for name in gone + stay:
        (tmp_path / name).touch()
    with writable_folder(tmp_path):
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {*stay, "layer_0"}


def test_the_second_of_two_runs_is_told(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    for name, (main, argv, flag) in COMMANDS.items():
        run = Path(name) / ("AD-darkroom-seed0" if main is train.main else "")
        with writable_folder(run):
            line = refused(main, [*argv, flag, name], capsys)
        assert f"another run is writing to {run}" in line


def test_a_folder_without_locks_is_written_to(tmp_path, monkeypatch):
    no_locks = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr("historylens.common.files.fcntl.flock", no_locks)
    with writable_folder(tmp_path), writable_folder(tmp_path):
        pass


@pytest.mark.parametrize(("signal_of", "code", "said"), [
    (signal.SIGTERM, 143, ["terminated"]), (signal.SIGINT, 130, ["interrupted"]),
    (signal.SIGHUP, 129, ["hung up"]), (signal.SIGKILL, -9, []),
])  # fmt: skip
def test_no_drawing_process_outlives_a_stopped_command(tmp_path, signal_of, code, said):
    home, pictures = tmp_path / "home", tmp_path / "home" / "pictures"
    pictures.mkdir(parents=True)

    def main(_):
        with Painter(2) as drawing:
            for i in range(2000):  # 20 seconds, if nothing stopped it
                drawing.draw(draw_slowly, pictures / str(i))

    pid = started(main, [], home)
    while len(drawn := [*pictures.iterdir()]) < 2:
        time.sleep(0.01)
    os.kill(pid, signal_of)
    end = ended(pid, home)
    assert (end.code, end.told) == (code, said)
    numbers = {int(path.read_text() or 0) for path in drawn} - {0}
    assert numbers
    until = time.monotonic() + 10  # on a machine that is busy
    while not all(map(is_over, numbers)):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert len([*pictures.iterdir()]) < 2000


def draw_slowly(path):
    time.sleep(0.02)
    path.write_text(str(os.getpid()))


def is_over(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return True


def test_ctrl_c_ends_a_command_of_ours_while_it_loads_and_no_other(monkeypatch):
    ours, other = Path(train.__file__), Path("/somewhere/train.py")
    before = signal.getsignal(signal.SIGINT)
    for file, handler in ((other, before), (ours, signal.SIG_DFL), ("/bin/historylens", 0)):
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(file), raising=False)
        importlib.reload(historylens.common)
        assert signal.getsignal(signal.SIGINT) == handler
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("start", "said"), [
    ("mkdir gone && cd gone && rmdir ../gone && exec {}", "error: the working folder is gone"),
    ("PYTHONOPTIMIZE=2 exec {}", "error: python -OO"),
])  # fmt: skip
def test_where_no_command_can_run_each_says_so(tmp_path, start, said):
    for main in (train, visualize_attention, compare_compression):
        command = ["sh", "-c", start.format(f"{sys.executable} {main.__file__} --help")]
        end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (end.returncode, end.stdout, end.stderr.count("\n")) == (2, "", 1)
        assert end.stderr.startswith(said)


@pytest.mark.parametrize(("command", "said"), [
    (train, "nothing to resume"), (visualize_attention, "No checkpoint found.*python train.py"),
])  # fmt: skip
def test_a_real_command_ends_in_one_line(tmp_path, monkeypatch, capsys, command, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command.__file__, *["--resume"] * (command is train)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(command.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert re.fullmatch(f"error: {said}.*\n", err)
    assert (out, [*tmp_path.iterdir()]) == ("", [])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_command_goes_on_where_a_signal_is_ignored(home, number):
    def main(_):
        for wrap in (contextlib.nullcontext, undivided):
            with wrap():
                os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_IGN)  # as nohup does, and a script in its background
    end = run_apart(main, [], home)
    signal.signal(number, before)
    assert end.code == 0


class Mute(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(("error", "line"), [
    (ValueError("\x1b[31mtwo\nlines"), "unexpected: ValueError:  [31mtwo lines; details in "),
    (MemoryError(), "error: out of memory: MemoryError; "),
    (SystemExit("why"), "unexpected: SystemExit: why; "),
    (Mute(), "unexpected: Mute; "), (GeneratorExit(1), "unexpected: GeneratorExit: 1; "),
    (BrokenPipeError(32, "Broken pipe"), "error: Broken pipe; "),
    (OSError(28, "No space left", "a.png"), "error: a.png: No space left; "),
])  # fmt: skip
def test_whatever_ends_a_command_is_one_line(error, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1
    assert end.value.code == 1 + line.startswith("error")
    assert [*map(str, tmp_path.iterdir())] == re.findall(r"details in (.*)\n", said)


def test_ends_that_were_meant_stay_and_no_room_for_details_is_said(monkeypatch, capsys):
    run_command(sys.exit)
    with pytest.raises(SystemExit, match="3"):
        run_command(lambda: sys.exit(3))
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    with pytest.raises(SystemExit):
        run_command(lambda: 1 / 0)
    said = "unexpected: ZeroDivisionError: division by zero; no room for its details\n"
    assert capsys.readouterr().err == said


FULL = "error: the console could not show all text; the files are whole"


@pytest.mark.parametrize(("names", "console", "code", "said"), [
    (COMMANDS, {"out": "/dev/full"}, 1, FULL),
    (["training"], {"err": "/dev/full"}, 1, None),
    (["comparison"], {"out": "pipe"}, 0, None),
    (["training"], {"out": None}, 0, None),
    (["analysis", "comparison"], {"out": None, "err": None}, 0, None),
    (["analysis"], {"encoding": "ascii"}, 0, None),
])  # fmt: skip
def test_the_console_stops_no_work(home, names, console, code, said):
    if console.get("out") == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        console = {"out": writer}
    last = {"analysis": "attention_layers.png", "comparison": "results.csv",
            "training": "AD-darkroom-seed0.png"}  # fmt: skip
    for name in names:
        main, argv, flag = COMMANDS[name]
        end = run_apart(main, [*argv, flag, f"out/{name}"], home, **console)
        assert (end.code, end.told) == (code, [said] if said else []), name
        assert last[name] in {Path(file).name for file in plain_files(home)}


def test_without_shared_memory_one_process_draws_and_says_so(monkeypatch, capsys):
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(type(multiprocessing.get_context("fork")), "Lock", denied)
    assert painter.drawing_processes(100) == 1
    assert "note: one process draws the pictures" in capsys.readouterr().err


def test_a_file_that_must_not_change_is_told_first(tmp_path, monkeypatch):
    path, real = tmp_path / "layer_0/attention_lines_sample0_layer0.png", os.access
    path.parent.mkdir()
    path.write_text("mine")
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != path and real(p, mode))
    with pytest.raises(UserError, match="is in the way"):
        prepare_output(tmp_path, [0])
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("changed", "said"), [
    *(({name: value}, "start several processes with `torchrun") for name, value in (
        ("WORLD_SIZE", "0"), ("WORLD_SIZE", "9" * 20), ("RANK", "2"), ("RANK", "-1"),
        ("LOCAL_RANK", "9"), ("MASTER_PORT", "none"),
    )),
    ({}, "the 2 processes of this job did not find each other"),
])  # fmt: skip
def test_an_environment_that_torchrun_never_made_is_told(monkeypatch, changed, said):
    monkeypatch.setattr(processes, "FINDING", processes.timedelta(milliseconds=100))
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
           "MASTER_PORT": "29518"}  # fmt: skip
    for name, value in (env | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        processes.join().__enter__()


def test_memory_is_estimated_from_below():
    assert train.n_bytes(*Settings()) < 2**31
    with pytest.raises(UserError, match=r"about 1,024 GiB .* lower --seeds"):
        expect_memory(2**40, "--seeds")
