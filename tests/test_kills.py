"""A kill before any change of a file costs nothing: the same command ends as if there was none.

    KILLS=100 python -m pytest tests/test_kills.py      # so many kills a command, not only a few

The changes are found by watching one run; the kills are spread over all of them.
"""

import json
import os
import shutil

import pytest
from apart import plain_files, run_apart, temporaries
from conftest import sharp_model, without_drawing, write_checkpoint
from test_train import TINY, flag_of
from test_visualize_attention import make_run

import compare_compression
import train
import visualize_attention
from historylens.pictures import INCOMPLETE

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


def make_home(folder, config):
    """A folder with a run to look at and to act with."""
    make_run(folder / "checkpoints" / "tiny", config)
    goals = [[0, 1], [2, 2]]
    write_checkpoint(folder / "checkpoints/tiny/ckpt-30.pt", sharp_model(config), goals, 30)
    return folder


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path, tiny_config, monkeypatch):
    """A command, its folder with what an earlier run left, and after it: what it changes there."""
    without_drawing(monkeypatch)
    name, (main, argv, _) = request.param, COMMANDS[request.param]
    before, after = make_home(tmp_path / name, tiny_config), tmp_path / "after" / name
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
