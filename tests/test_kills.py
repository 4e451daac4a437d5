"""A kill before any change of a file costs nothing, and what is damaged is set aside.

    KILLS=100 python -m pytest tests/test_kills.py      # so many kills a command, not only a few

The same command ends as if there was none. The changes are found by watching one run; the kills
are spread over all of them.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from apart import plain_files, run_apart, temporaries
from conftest import without_drawing
from levers import LeversAgent
from test_train import TINY, flag_of
from test_visualize_attention import make_run

import compare_compression
import train
import visualize_attention
from historylens.common.files import set_aside
from historylens.comparison import CompareConfig, compare
from historylens.comparison.results import CONFIRMATION, RESULTS, ResultsFile
from historylens.pictures import INCOMPLETE
from historylens.pictures.painter import Painter

N_KILLS = int(os.environ.get("KILLS", 4))
ANALYSIS = ["--num-samples=3", "--num-figures=1", "--num-effects=0", "--dpi=20", "--device=cpu"]
COMPARISON = ["--strategies", "recent", "--budgets=3", "--seeds=1", "--episodes=2", "--confirm=0",
              "--device=cpu"]  # fmt: skip
TRAINING = [f"{flag_of(name)}={value}" for name, value in TINY.items()]
COMMANDS = {
    "analysis": (visualize_attention.main, ANALYSIS, "--out"),
    "comparison": (compare_compression.main, COMPARISON, "--out"),
    "training": (train.main, TRAINING, "--checkpoints"),
}


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path, tiny_config, monkeypatch):
    """A command, its folder with what an earlier run left, and after it: what it changes there."""
    without_drawing(monkeypatch)
    name, (main, argv, _) = request.param, COMMANDS[request.param]
    before, after = tmp_path / name, tmp_path / "after" / name
    make_run(before / "checkpoints" / "tiny", tiny_config)
    if main is not train.main:
        assert run_apart(main, [*argv, "--seed=1"], before).code == 0
    shutil.copytree(before, after)
    assert run_apart(main, argv, after).code == 0
    return name, before, after, after.with_name("changes").read_text().split()


def as_it_should_be(name, folder, before, after):
    """Whether a folder is what it was, or what it becomes, or says that it is neither."""
    now = plain_files(folder)
    if name == "analysis":
        said = now.get(f"figs/attention/{INCOMPLETE}")
        whole = plain_files(before), plain_files(after)
        return b"run its command again" in said if said else now in whole
    results = folder / "figs/compression/results.json"
    if name == "comparison" and results.exists() and json.loads(results.read_text())["complete"]:
        said = {name: content for name, content in now.items() if "earlier-" not in name}
        return any(said.items() >= there.items() for there in (
            {k: v for k, v in plain_files(one).items() if k.startswith("figs/compression/r") and
             k.endswith("json")} for one in (before, after)))  # fmt: skip
    return True


def test_a_kill_at_any_change_of_a_file_costs_nothing(command, tmp_path):
    name, before, after, changes = command
    main, argv, _ = COMMANDS[name]
    n_kills = min(N_KILLS, len(changes))
    for kill_at in sorted({len(changes) * i // n_kills for i in range(n_kills)}):
        folder = tmp_path / str(kill_at) / name
        shutil.copytree(before, folder)
        assert run_apart(main, argv, folder, kill_at=kill_at).code == -9
        assert not [path for path in folder.rglob("*.png") if not path.stat().st_size]
        assert as_it_should_be(name, folder, before, after), (kill_at, changes[kill_at])
        more = ["--resume"] * bool([*folder.rglob("resume.pt")])
        end = run_apart(main, [*argv, *more], folder)
        is_over = "holds a run already" in end.err  # killed where all was done
        assert end.code == (2 if is_over else 0), (kill_at, end.err)
        assert plain_files(folder) == plain_files(after), (kill_at, changes[kill_at])
        assert not temporaries(folder)
        shutil.rmtree(folder)


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch):
    """A folder with a run to look at and to act with; pictures are a few bytes."""
    without_drawing(monkeypatch)
    make_run(tmp_path / "home" / "checkpoints" / "tiny", tiny_config)
    return tmp_path / "home"


def test_a_folder_that_goes_away_is_a_line(home, monkeypatch):
    draw = Painter.draw

    def remove(self, *args, **kwargs):
        shutil.rmtree("out", ignore_errors=True)
        draw(self, *args, **kwargs)

    monkeypatch.setattr(Painter, "draw", remove)
    end = run_apart(visualize_attention.main, [*ANALYSIS, "--out=out"], home)
    [line] = end.told
    assert re.match("error: out.*No such file or directory", line)


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


@pytest.mark.parametrize("spoil", ["empty", "half", "folder", "step", "log", "checkpoint", "other"])
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
    elif spoil == "folder":
        resume.unlink()
        resume.mkdir()
    else:
        resume.write_bytes(resume.read_bytes()[: 5000 * (spoil == "half")])
    end = run_apart(train.main, [*TRAINING, "--resume"], home)
    assert end.code == 0
    assert re.search("^note: .* held a damaged resume.pt.* moved", end.err, re.MULTILINE)
    assert (run / "earlier-1/resume.pt").exists()
    assert {name: plain_files(run)[name] for name in whole} == whole


def test_a_file_in_the_folder_of_a_new_run_is_kept(home):
    run = home / "checkpoints/AD-darkroom-seed0"
    run.mkdir()
    (run / "training.json").write_text("mine")
    assert run_apart(train.main, TRAINING, home).code == 0
    assert (run / "earlier-1/training.json").read_text() == "mine"
