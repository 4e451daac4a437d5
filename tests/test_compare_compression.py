"""The command: its files, console text, flags, interruptions and errors."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sharp_model
from levers import levers_task

import compare_compression as module
from checkpoint import save_checkpoint
from compare_compression import all_strategies, main
from comparison import playing
from comparison.intervals import late_scores
from comparison.kept_results import CONFIRMATION, FILES
from config import EnvConfig, run_command, to_dict

CHECKPOINT = Path("checkpoints/tiny/ckpt-30.pt")
SMALL = ["--strategies", "recent", "random", "top-k", "--budgets", "3", "6",
         "--seeds", "2", "--episodes", "3"]  # fmt: skip


def make_run(folder, config):
    content = {
        "step": 30,
        "config": to_dict(config, EnvConfig(grid_size=5, horizon=5)),
        "model": sharp_model(config).state_dict(),
        "goals": {"train": [[0, 0]], "validation": [[1, 2]], "test": [[0, 1], [2, 2], [4, 3]]},
    }
    save_checkpoint(folder / CHECKPOINT, content)


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch):
    """A folder with a run in it, to work in."""
    make_run(tmp_path, tiny_config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def timeless(folder):
    """The files of a comparison without what clocks measured."""
    files = files_of(folder)
    result = json.loads(files["results.json"])
    for arm in result["arms"].values():
        del arm["seconds"]
    rows = result.get("summary", {}).get("rows", [])
    table = list(csv.DictReader(files["results.csv"].decode().splitlines()))
    for row in [*rows, *table]:
        for name in ("ms_selecting", "ms_model"):
            del row[name]
    return files | {"results.json": json.dumps(result), "results.csv": table}


def no_pictures(monkeypatch):
    from comparison import figures as comparison_figures

    for name in ("draw_by_budget", "draw_by_episode"):
        monkeypatch.setattr(comparison_figures, name, lambda path, *_: path.write_bytes(b"png"))


# What a comparison leaves


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_config):
    """The command as a user runs it, but for size; its console text."""
    folder = tmp_path_factory.mktemp("done")
    make_run(folder, tiny_config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        out = subprocess.run(
            [sys.executable, module.__file__, *SMALL],
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=300,
        )
    assert out.returncode == 0, out.stderr
    return folder, out


def test_files_are_those_that_are_documented(done):
    folder, _ = done
    assert set(files_of(folder / "figs" / "compression")) == set(FILES)


def test_the_console_announces_the_work_and_ends_in_one_recommendation(done):
    _, out = done
    assert "checkpoints/tiny/ckpt-30.pt (the only run, highest step of 1)" in out.stdout
    assert "10 arms x 90 decisions = 900" in out.stdout
    assert "Margin:     5% of full history's return" in out.stdout
    assert "numbered anew (reindexed)" in out.stdout
    for name in ("full", "empty", "other-task", "recent@3", "random@6", "top-k@6"):
        assert f"\n{name} " in out.stdout
    assert out.stdout.count("\n=> ") == 1
    assert "Traceback" not in out.stderr
    assert "Warning" not in out.stderr
    assert "900/900" in out.stderr


def test_json_and_csv_agree_and_hold_every_return(done):
    folder, _ = done
    files = files_of(folder / "figs" / "compression")
    result = json.loads(files["results.json"])
    assert result["complete"]
    arms = ["full", "empty", "other-task", "shuffled-rewards", "recent@3", "recent@6", "random@3",
            "random@6", "top-k@3", "top-k@6"]  # fmt: skip
    assert list(result["arms"]) == arms
    returns = torch.tensor([arm["returns"] for arm in result["arms"].values()], dtype=torch.float64)
    assert returns.shape == (10, 3, 2, 3)  # arms, goals, seeds, episodes
    table = list(csv.DictReader(files["results.csv"].decode().splitlines()))
    assert len(table) == len(result["summary"]["rows"]) == 10
    for row, record in zip(table, result["summary"]["rows"], strict=True):
        key = row["strategy"] + (f"@{row['budget']}" if row["budget"] else "")
        late = returns[arms.index(key)][:, :, 1:].mean()
        assert float(row["return"]) == record["return"] == pytest.approx(float(late))
        budget = record["budget"]
        assert record["tokens_per_decision"] > 0
        if budget:
            assert record["kept"] == budget
            assert result["arms"][key]["cost"]["identical_to_full"] == 0
    assert result["summary"]["step"] == 30
    assert result["summary"]["positions"] == "reindexed"


def test_the_same_command_again_plays_nothing_and_writes_the_same_bytes(done, monkeypatch, capsys):
    folder, _ = done
    monkeypatch.chdir(folder)
    monkeypatch.setattr(playing, "play", None)
    before = files_of("figs/compression")
    main(SMALL)
    assert files_of("figs/compression") == before
    found = " ".join(capsys.readouterr().out.split())
    assert "results.json has 10 finished arms of these settings" in found
    assert "0 arms x 90 decisions = 0" in found


def test_a_killed_comparison_goes_on_to_the_same_files(done, tmp_path, monkeypatch, capsys):
    folder, _ = done
    monkeypatch.chdir(folder)
    results = tmp_path / "out" / "results.json"
    slow = (
        "import time, compare_compression as c\n"
        "from comparison import playing\n"
        "play = playing.play\n"
        "def slowly(task, arm, *more):\n"
        "    time.sleep(0 if arm.name in ('full', 'empty') else 60)\n"
        "    return play(task, arm, *more)\n"
        f"playing.play = slowly; c.main({[*SMALL, '--out', str(tmp_path / 'out')]!r})"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(module.__file__).parent)
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=environment)  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (results.exists() and "empty" in json.loads(results.read_text())["arms"]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(json.loads(results.read_text())["arms"]) == ["full", "empty"]
    main([*SMALL, "--out", str(tmp_path / "out")])
    assert "8 arms x 90 decisions = 720" in capsys.readouterr().out
    assert timeless(tmp_path / "out") == timeless("figs/compression")


def test_ctrl_c_says_what_is_kept_and_leaves_a_valid_file(home, monkeypatch, capsys):
    real = playing.play

    def interrupted(task, arm, *more):
        if arm.key == "recent@6":
            raise KeyboardInterrupt
        return real(task, arm, *more)

    monkeypatch.setattr(playing, "play", interrupted)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main([*SMALL, "--out", "out"]))
    assert caught.value.code == 130
    err = capsys.readouterr().err
    assert "5 of 10 arms are kept in out/results.json: the same command goes on from there" in err
    assert set(files_of("out")) == {"results.json"}
    assert len(json.loads(Path("out/results.json").read_text())["arms"]) == 5


def test_another_comparison_moves_earlier_files_aside(home, monkeypatch, capsys):
    no_pictures(monkeypatch)
    argv = ["--strategies", "recent", "--budgets", "3", "--episodes", "2", "--out", "out"]
    main([*argv, "--seeds", "2"])
    before = files_of("out")
    capsys.readouterr()
    main([*argv, "--seeds", "3"])
    found = " ".join(capsys.readouterr().out.split())
    assert (
        "Results of another comparison (other seeds) were in out: moved to out/earlier-1" in found
    )
    after = files_of("out")
    assert {name: after[f"earlier-1/{name}"] for name in FILES} == before
    assert set(after) == {*FILES, *(f"earlier-1/{name}" for name in FILES)}


def test_more_strategies_play_only_what_is_missing_and_a_new_margin_nothing(
    home, monkeypatch, capsys
):
    no_pictures(monkeypatch)
    argv = ["--budgets", "3", "--episodes", "2", "--seeds", "2", "--out", "out"]
    main([*argv, "--strategies", "recent"])
    capsys.readouterr()
    main([*argv, "--strategies", "recent", "even", "--margin", "0.2"])
    assert "1 arms x 60 decisions" in capsys.readouterr().out
    result = json.loads(Path("out/results.json").read_text())
    assert result["summary"]["margin_share"] == 0.2
    assert {row["strategy"] for row in result["summary"]["rows"]} >= {"recent", "even"}
    main([*argv, "--strategies", "even"])
    result = json.loads(Path("out/results.json").read_text())
    assert "recent@3" in result["arms"]  # kept, though not asked for this time
    assert "recent" not in {row["strategy"] for row in result["summary"]["rows"]}


# Flags


def planned(*argv):
    config = module.from_flags(module.CompareConfig, module.make_parser().parse_args(argv))
    return module.prepare(config)


def test_default_budgets_are_those_that_the_model_can_read_and_all_of_it(home):
    job = planned()
    assert {arm.n_keep for arm in job.arms if arm.n_keep} == {10, 11}
    assert job.left_out == (20, 40)
    assert planned("--budgets", "3").left_out == ()


def test_full_plays_all_strategies_with_more_seeds_and_episodes(home):
    quick, full = planned(), planned("--full")
    assert {arm.name for arm in full.arms} >= {*all_strategies(), "full", "empty", "other-task"}
    assert len(quick.arms) < len(full.arms)
    assert (full.plays.n_seeds, full.plays.n_episodes) == (16, 40)
    assert quick.plays.n_seeds < 16
    chosen = planned("--full", "--strategies", "recent", "--seeds", "3", "--episodes", "9")
    assert {arm.name for arm in chosen.arms if arm.n_keep} == {"recent"}
    assert (chosen.plays.n_seeds, chosen.plays.n_episodes) == (3, 9)


def test_positions_reach_the_model_and_the_console(home, monkeypatch, capsys):
    no_pictures(monkeypatch)
    argv = ["--strategies", "even", "--budgets", "6", "--episodes", "4", "--seeds", "2"]
    main([*argv, "--out", "re"])
    main([*argv, "--out", "orig", "--positions", "original"])
    assert "old positions where they fit (original)" in capsys.readouterr().out
    re, orig = (json.loads(Path(f"{x}/results.json").read_text())["arms"] for x in ("re", "orig"))
    assert re["full"]["returns"] == orig["full"]["returns"]
    assert re["even@6"]["returns"] != orig["even@6"]["returns"]


def test_seed_changes_the_returns(home, monkeypatch):
    no_pictures(monkeypatch)
    argv = ["--strategies", "recent", "--budgets", "3", "--episodes", "2", "--seeds", "2"]
    for seed in "01":
        main([*argv, "--seed", seed, "--out", seed])
    one, other = (json.loads(Path(f"{x}/results.json").read_text())["arms"] for x in "01")
    assert one["full"]["returns"] != other["full"]["returns"]


# Errors


def rewrite(**changed):
    content = torch.load(CHECKPOINT, weights_only=True)
    save_checkpoint(CHECKPOINT, content | changed)


MISTAKES = {
    "no checkpoint": (CHECKPOINT.unlink, [], "python train.py"),
    "no folder of checkpoints": (None, ["--checkpoint", "nowhere"], "python train.py"),
    "no goals": (lambda: rewrite(goals={}), [], "holds no test goals"),
    "no test goals": (lambda: rewrite(goals={"train": [[0, 0]]}), [], "holds no test goals"),
    "goals of a larger room": (
        lambda: rewrite(goals={"test": [[7, 7]]}), [], "its test goals do not fit its room"
    ),
    "unknown strategy": (
        None, ["--strategies", "recent", "rewarded"], "unknown strategy 'rewarded': did you mean"
    ),
    "budget beyond the model": (
        None, ["--budgets", "3", "12"], "expected --budgets in 1..11"
    ),
    "history shorter than the budget": (
        None, ["--episodes", "2", "--budgets", "10"], "history shorter than the budget"
    ),
    "a file as output": (lambda: Path("file").write_text(""), ["--out", "file"], "--out"),
    "output below a file": (lambda: Path("file").write_text(""), ["--out", "file/a"], "--out"),
    "a device that is not there": (None, ["--device", "abacus"], "'abacus'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_earlier_results(home, capsys, name):
    prepare, argv, message = MISTAKES[name]
    Path("out").mkdir()
    for file in FILES:
        (Path("out") / file).write_text("earlier")
    before = files_of("out")
    if prepare is not None:
        prepare()
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(["--out", "out", *argv]))
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert files_of("out") == before


@pytest.mark.parametrize("name", [*FILES, CONFIRMATION])
def test_what_stands_in_the_way_of_a_file_is_one_line(home, capsys, name):
    (home / "out" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main([*SMALL, "--out", "out"]))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{name} is in the way" in err


@pytest.mark.parametrize(
    "argv",
    [
        "--budgets 0", "--budgets 3 -2", "--budgets many", "--budgets 1.5", "--seeds 0",
        "--episodes 0", "--margin 2", "--margin -0.1", "--margin nan", "--margin much",
        "--positions old", "--seed -1",
    ],
)  # fmt: skip
def test_a_flag_without_sense_is_an_error_that_names_it(home, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert argv.split()[0] in err.splitlines()[-1]


# Confirmation


@pytest.fixture
def levers(tmp_path, monkeypatch):
    """The command on the planted task: arguments of a comparison that 2 seeds cannot settle."""
    monkeypatch.chdir(tmp_path)
    planted = levers_task(), {"Checkpoint": "planted"}, {"checkpoint": "planted"}
    monkeypatch.setattr(module, "load_task", lambda config: planted)
    return ["--strategies", "random", "--budgets", "14", "--seeds", "2", "--episodes", "8"]


def test_the_most_promising_arm_is_played_again_where_nothing_is_shown_to_be_safe(levers, capsys):
    main([*levers, "--confirm", "24", "--margin", "0.4"])
    console = capsys.readouterr().out
    summary = json.loads(Path("figs/compression/results.json").read_text())["summary"]
    kept = json.loads(Path("figs/compression/confirmation.json").read_text())
    confirmation = summary["confirmation"]
    assert confirmation["seeds"] == 24
    assert list(kept["arms"]) == ["full", "random@14"]
    returns = np.array(kept["arms"]["random@14"]["returns"], dtype=float)
    assert returns.shape == (3, 24, 8)
    arm = confirmation["rows"][1]
    assert arm["return"] == pytest.approx(late_scores(returns).mean())
    assert arm["verdict"] in ("safe", "better")
    assert summary["recommended"] == "random@14"
    assert "Recommended for this checkpoint: random with 14 transitions" in console
    assert "on 24 new seeds a goal" in " ".join(console.split())


def test_a_confirmation_is_not_played_twice_and_can_be_left_out(levers, monkeypatch, capsys):
    main([*levers, "--confirm", "3"])
    first = capsys.readouterr().out.partition("COMPRESSED")[2]
    monkeypatch.setattr(playing, "play", None)
    main([*levers, "--confirm", "3"])
    assert capsys.readouterr().out.partition("COMPRESSED")[2] == first
    main([*levers, "--confirm", "0"])
    assert "Played again on 3 new seeds a goal" in " ".join(first.split())
    assert "Played again" not in " ".join(capsys.readouterr().out.split())
