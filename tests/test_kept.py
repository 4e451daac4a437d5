"""Results and runs that are kept: damaged ones are set aside, and the command begins anew."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from apart import plain_files, run_apart
from conftest import without_drawing
from levers import LeversAgent
from test_kills import TRAINING

import train
from historylens.common.files import set_aside
from historylens.comparison import CompareConfig, compare
from historylens.comparison.results import CONFIRMATION, RESULTS, ResultsFile


@pytest.fixture
def home(tmp_path, monkeypatch):
    without_drawing(monkeypatch)
    (tmp_path / "home" / "checkpoints").mkdir(parents=True)
    return tmp_path / "home"


def test_what_an_interrupted_move_left_goes_where_the_rest_is(tmp_path):
    names = ["a.png", "b.csv", "c.json"]
    assert set_aside(tmp_path, names) is None
    for number in (1, 2):
        for name in names:
            (tmp_path / name).write_text(str(number))
        (tmp_path / f"earlier-{number}").mkdir()
        os.replace(tmp_path / "a.png", tmp_path / f"earlier-{number}" / "a.png")  # interrupted
        assert set_aside(tmp_path, names) == tmp_path / f"earlier-{number}"
    assert plain_files(tmp_path / "earlier-1") == dict.fromkeys(names, b"1")


def damaged(text):
    """Ways to spoil kept results, each a text of the file."""
    content = json.loads(text)
    [block] = content["arms"]["full"]["blocks"]
    returns = block["returns"]
    yield from ("", "{", "[" * 100_000, "[]", json.dumps(content | {"schema_version": 9}))
    for value in ("NaN", "1e999", "1" + "0" * 400, '"a"', "[1]"):
        returns[0][0][0] = "HERE"
        yield json.dumps(content).replace('"HERE"', value)
    returns[0][0][0] = 1
    yield json.dumps(content | {"arms": {"full": content["arms"]["full"] | {"budget": 3}}})
    block["returns"] = returns[1:]
    yield json.dumps(content)
    block["first_seed"], block["returns"] = 1, returns
    yield json.dumps(content)
    block |= {"first_seed": 0, "cost": {"decisions": None}}
    yield json.dumps(content).replace("null", "Infinity")


@pytest.mark.parametrize("name", [RESULTS, CONFIRMATION])
def test_damaged_results_are_set_aside_and_played_again(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    wanted = {"strategies": ["random"], "budgets": [14], "seeds": 2, "episodes": 8, "confirm": 2}
    path = Path("figs/compression") / name

    def again():
        compare(LeversAgent(), CompareConfig(**wanted, margin=0.4))
        said = capsys.readouterr()
        return " ".join(f"{said.out} {said.err}".split())

    again()
    whole, text = plain_files(path.parent), path.read_text()
    known = json.loads(text)["fingerprint"]
    for number, bad in enumerate(damaged(text), start=1):
        path.write_text(bad)
        found, aside = (
            ResultsFile(path.parent, known, name).found,
            path.parent / f"earlier-{number}",
        )
        assert re.search(rf"\((a damaged {name}|of another version)\).* moved to {aside}", found)
        assert (aside / name).read_text() == bad
    path.unlink(missing_ok=True)
    path.mkdir()
    assert f"(a damaged {name}) were in {path.parent}: moved to" in again()
    assert (path.parent / f"earlier-{number + 1}" / name).is_dir()
    assert {name: plain_files(path.parent)[name] for name in whole} == whole


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The home of a run killed before its last change but one, and the files of a whole one."""
    home = tmp_path_factory.mktemp("killed") / "home"
    run = home / "checkpoints/AD-darkroom-seed0"
    run.parent.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        without_drawing(patch)
        assert run_apart(train.main, TRAINING, home).code == 0
        n_changes = len(home.with_name("changes").read_text().split())
        whole = plain_files(run)
        shutil.rmtree(run)
        shutil.rmtree(home / "figs")
        assert run_apart(train.main, TRAINING, home, kill_at=n_changes - 1).code == -9
    return home, whole


@pytest.mark.parametrize("spoil", ["empty", "folder", "step", "log", "checkpoint", "other"])
def test_a_damaged_resume_is_set_aside_and_the_run_begins_anew(home, killed, spoil):
    run, whole = home / "checkpoints/AD-darkroom-seed0", killed[1]
    shutil.copytree(killed[0], home, dirs_exist_ok=True)
    resume = run / "resume.pt"
    state = torch.load(resume)
    if spoil in ("step", "log", "other"):
        changed = {"step": {"step": 10**9}, "log": {"log": [{"best": 1}]}, "other": {"model": {}}}
        torch.save(state | changed[spoil], resume)
    elif spoil == "checkpoint":
        [path.unlink() for path in run.glob("ckpt-*")]
    else:
        resume.unlink()
        resume.mkdir() if spoil == "folder" else resume.touch()
    end = run_apart(train.main, [*TRAINING, "--resume"], home)
    assert end.code == 0
    assert [line for line in end.err.splitlines() if line.startswith("note: ") and "moved" in line]
    assert (run / "earlier-1/resume.pt").exists()
    assert {name: plain_files(run)[name] for name in whole} == whole


def test_a_file_in_the_folder_of_a_new_run_is_kept(home):
    run = home / "checkpoints/AD-darkroom-seed0"
    run.mkdir()
    (run / "training.json").write_text("mine")
    assert run_apart(train.main, TRAINING, home).code == 0
    assert (run / "earlier-1/training.json").read_text() == "mine"
