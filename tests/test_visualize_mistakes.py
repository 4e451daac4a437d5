"""The command where something is wrong: one line, and earlier results as they were."""

import errno
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import test_visualize_attention
from conftest import files_of, make_histories, refused
from test_visualize_attention import names_of
from torch import nn

import visualize_attention as module
from historylens.common.errors import run_command
from visualize_attention import main

home = test_visualize_attention.home  # with pictures that take no time to draw


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHECKPOINT = Path("checkpoints/tiny/ckpt-30.pt")
HISTORIES = Path("checkpoints/tiny/histories-test.npz")
MISTAKES = {
    # name: (what comes before, flags, what is said)
    "no folder of checkpoints": (list, ["--checkpoint", "nowhere"], "python train.py"),
    "truncated checkpoint": (lambda: truncate(CHECKPOINT), [], "truncated"),
    "no histories": (HISTORIES.unlink, [], "--histories"),
    "no history in the file": (
        lambda: make_histories(np.zeros((0, 2), int)).save(HISTORIES), [], str(HISTORIES)
    ),
    "histories of a larger room": (
        lambda: make_histories(((6, 6),), grid_size=13).save(HISTORIES), [], "does not fit the che"
    ),
    "unknown layer": (list, ["--layers", "0", "2"], "unknown layer 2: expected --layers in 0..1"),
    "negative layer": (list, ["--layers", "-1"], "unknown layer -1"),
    "too long a stride": (list, ["--stride", "40"], "stride 40"),
    "output below a file": (lambda: Path("file").write_text(""), ["--out", "file/a"], " file/a"),
    "a device that is not there": (list, ["--device", "cuda:99"], "'cuda:99', which is not there"),
    "no output folder": (list, ["--out", ""], "expected --out not to be empty"),
    "a comparison's folder": (
        lambda: Path("out/results.json").write_text('{"schema_version": 2}'), [],
        "out holds results of the comparison (results.json): choose another folder with --out",
    ),
}  # fmt: skip


def earlier_result(home):
    """An output folder as an earlier run left it."""
    (home / "out" / "layer_0").mkdir(parents=True)
    for name in names_of([0], [0]):
        (home / "out" / name).write_text(name)
    return files_of(home / "out")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_earlier_results(home, capsys, name):
    prepare, argv, message = MISTAKES[name]
    before = earlier_result(home)
    prepare()
    before |= files_of(home / "out")
    assert message in refused(main, ["--out", "out", *argv], capsys)
    assert files_of(home / "out") == before


FORMS = {"--steps": "expected FIRST:LAST, for example", "--goal": "expected ROW,COL, for example"}


@pytest.mark.parametrize("argv", [
    "--num-samples 0", "--num-samples many", "--num-figures -1", "--stride 0", "--seed -1",
    "--steps 7", "--steps 1:2:3:4", "--goal 3", "--goal a,b", "--no-such-flag",
])  # fmt: skip
def test_a_flag_without_sense_is_an_error_that_names_it_and_the_right_form(home, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(argv.split()))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    line, flag = err.splitlines()[-1], argv.split()[0]
    for part in ("error: ", flag, FORMS.get(flag, "")):
        assert part in line


@pytest.mark.parametrize(("where", "name", "error"), [
    (nn.TransformerEncoderLayer, "forward", RuntimeError("broken layer")),
    (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
])  # fmt: skip
def test_a_failure_before_the_first_picture_leaves_earlier_results(
    home, monkeypatch, where, name, error
):
    def broken(*_, **__):
        raise error

    before = earlier_result(home)
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(type(error), match=error.args[-1]):
        main(["--out", "out", "--num-samples", "2", "--num-effects", "0"])
    assert files_of(home / "out") == before


@pytest.mark.parametrize(
    "name", ["layer_0", "metrics.json/x", "layer_0/attention_lines_sample7_layer0.svg/x"]
)
def test_what_stands_in_the_way_of_a_file_is_one_line(home, capsys, name):
    path = home / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("in the way")
    line = refused(main, ["--num-samples", "1", "--out", "out"], capsys)
    assert "cannot write to the output folder out" in line
    assert path.read_text() == "in the way"


def test_without_a_checkpoint_the_command_says_to_train_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module.__file__])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(module.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert re.fullmatch("error: No checkpoint found.*python train.py.*\n", err)
    assert (out, list(tmp_path.iterdir())) == ("", [])
