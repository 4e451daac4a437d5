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
from agents import ModelAgent
from conftest import refused, sharp_model, write_checkpoint
from levers import LeversAgent

import compare_compression
from compare_compression import main
from historylens import analysis, comparison
from historylens.agent import Environment
from historylens.common.errors import run_command
from historylens.comparison import WITH_BUDGET, CompareConfig, compare, playing
from historylens.comparison.intervals import late_scores
from historylens.comparison.results import CONFIRMATION, FILES
from historylens.pictures import returns as pictures

ROOT = Path(compare_compression.__file__).parent
CHECKPOINT = Path("checkpoints/tiny/ckpt-30.pt")
SMALL = ["--strategies", "recent", "random", "top-k", "--budgets", "3", "6",
         "--seeds", "2", "--episodes", "3"]  # fmt: skip
TINY = ["--budgets", "3", "--episodes", "2", "--seeds", "2", "--out", "out"]
ARMS = ["full", "empty", "other-task", "shuffled-rewards", "recent@3", "recent@6", "random@3",
        "random@6", "top-k@3", "top-k@6"]  # fmt: skip


def make_run(folder, config):
    write_checkpoint(folder / CHECKPOINT, sharp_model(config), [[0, 1], [2, 2], [4, 3]], step=30)


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch):
    """A folder with a run in it, to work in; pictures are not drawn."""
    make_run(tmp_path, tiny_config)
    monkeypatch.chdir(tmp_path)
    for name in ("draw_by_budget", "draw_by_episode"):
        monkeypatch.setattr(pictures, name, lambda path, *_: path.write_bytes(b"png"))
    return tmp_path


def files_of(folder):
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def table_of(folder):
    return list(csv.DictReader((Path(folder) / "results.csv").read_text().splitlines()))


def timeless(folder):
    """The files of a comparison without what clocks measured."""
    result, table = results_of(folder), table_of(folder)
    for arm in result["arms"].values():
        del arm["seconds"]
    for row in [*result["summary"]["rows"], *table]:
        del row["ms_selecting"], row["ms_model"]
    return files_of(folder) | {"results.json": json.dumps(result), "results.csv": table}


def python(*arguments, **options):
    """Start a process as a user does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


# What a comparison leaves


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_config):
    """The command as a user runs it, but for size; its console text."""
    folder = tmp_path_factory.mktemp("done")
    make_run(folder, tiny_config)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    process = python(compare_compression.__file__, *SMALL, cwd=folder, **pipes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out, err


def test_the_console_announces_the_work_and_ends_in_one_recommendation(done):
    _, out, err = done
    assert "checkpoints/tiny/ckpt-30.pt (the only run, highest step of 1)" in out
    assert "10 arms x 90 decisions = 900" in out
    assert "Margin:     5% of full history's return" in out
    assert "numbered anew (reindexed)" in out
    assert all(f"\n{key} " in out for key in ARMS)
    assert out.count("\n=> ") == 1
    assert "Traceback" not in err
    assert "Warning" not in err
    assert "900/900" in err


def test_files_are_those_that_are_documented_and_hold_every_return(done):
    folder = done[0] / "figs" / "compression"
    assert set(files_of(folder)) == set(FILES)
    result, table = results_of(folder), table_of(folder)
    assert result["complete"]
    assert list(result["arms"]) == ARMS
    returns = torch.tensor([arm["returns"] for arm in result["arms"].values()], dtype=torch.float64)
    assert returns.shape == (10, 3, 2, 3)  # arms, goals, seeds, episodes
    assert len(table) == 10
    for row, record in zip(table, result["summary"]["rows"], strict=True):
        key = row["strategy"] + (f"@{row['budget']}" if row["budget"] else "")
        late = returns[ARMS.index(key)][:, :, 1:].mean()
        assert float(row["return"]) == record["return"] == pytest.approx(float(late))
        assert record["tokens_per_decision"] > 0
        assert result["arms"][key]["cost"]["identical_to_full"] == 0
        assert record["budget"] in (None, record["kept"])
    assert result["summary"]["step"] == 30
    assert result["summary"]["positions"] == "reindexed"


def test_the_same_command_again_plays_nothing_and_writes_the_same_bytes(done, monkeypatch, capsys):
    monkeypatch.chdir(done[0])
    monkeypatch.setattr(playing, "play", None)
    before = files_of("figs/compression")
    main(SMALL)
    assert files_of("figs/compression") == before
    said = " ".join(capsys.readouterr().out.split())
    assert "results.json has 10 finished arms of these settings" in said
    assert "0 arms x 90 decisions = 0" in said


def test_a_killed_comparison_goes_on_to_the_same_files(done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(done[0])
    out = tmp_path / "out"
    slow = (
        "import time, compare_compression as c\n"
        "from historylens.comparison import playing\n"
        "play = playing.play\n"
        "def slowly(agent, arm, *more):\n"
        "    time.sleep(0 if arm.name in ('full', 'empty') else 60)\n"
        "    return play(agent, arm, *more)\n"
        f"playing.play = slowly; c.main({[*SMALL, '--out', str(out)]!r})"
    )
    process = python("-c", slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (out / "results.json").exists() or "empty" not in results_of(out)["arms"]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(results_of(out)["arms"]) == ["full", "empty"]
    main([*SMALL, "--out", str(out)])
    assert "8 arms x 90 decisions = 720" in capsys.readouterr().out
    assert timeless(out) == timeless("figs/compression")


def test_ctrl_c_says_what_is_kept_and_leaves_a_valid_file(home, monkeypatch, capsys):
    real = playing.play

    def interrupted(agent, arm, *more):
        if arm.key == "recent@6":
            raise KeyboardInterrupt
        return real(agent, arm, *more)

    monkeypatch.setattr(playing, "play", interrupted)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([*SMALL, "--out", "out"]))
    assert end.value.code == 130
    err = capsys.readouterr().err
    assert "5 of 10 arms are kept in out/results.json: the same command goes on from there" in err
    assert set(files_of("out")) == {"results.json"}
    assert list(results_of("out")["arms"]) == ARMS[:5]


def test_more_strategies_play_only_what_is_missing_and_a_new_margin_nothing(home, capsys):
    main([*TINY, "--strategies", "recent"])
    main([*TINY, "--strategies", "recent", "even", "--margin", "0.2"])
    assert "1 arms x 60 decisions" in capsys.readouterr().out
    assert results_of("out")["summary"]["margin_share"] == 0.2
    assert {row["strategy"] for row in table_of("out")} >= {"recent", "even"}
    main([*TINY, "--strategies", "even"])
    assert "recent@3" in results_of("out")["arms"]  # kept, though not asked for this time
    assert "recent" not in {row["strategy"] for row in table_of("out")}


# Flags


@pytest.fixture
def planned(home, tiny_model, monkeypatch):
    """Arms and plays of a comparison with some settings, which is then interrupted."""
    noted = []

    def stop(agent, arms, plays, results):
        noted[:] = {(arm.name, arm.n_keep) for arm in arms}, plays
        raise KeyboardInterrupt

    def of(**settings):
        environment = Environment(("a", "b"), 5, lambda numbers: None)
        with pytest.raises(KeyboardInterrupt):
            compare(ModelAgent(tiny_model, environment), CompareConfig(**settings))
        return noted

    monkeypatch.setattr(comparison, "play_arms", stop)
    return of


def test_default_budgets_are_those_that_the_model_can_read_and_all_of_it(planned, capsys):
    assert {n_keep for _, n_keep in planned()[0]} == {None, 10, 11}
    assert "10, 11 of up to 11 transitions (the usual 20, 40 exceed" in capsys.readouterr().out
    planned(budgets=[3])
    assert "the usual" not in capsys.readouterr().out


def test_full_plays_all_strategies_with_more_seeds_and_episodes(planned):
    quick, plays = planned(budgets=[3])
    assert (plays.n_seeds, plays.n_episodes) == (4, 24)
    full, plays = planned(budgets=[3], full=True)
    assert (plays.n_seeds, plays.n_episodes) == (16, 40)
    assert full == (quick | {(name, 3) for name in WITH_BUDGET}) > quick
    chosen, plays = planned(budgets=[3], full=True, strategies=["recent"], seeds=3, episodes=9)
    assert (plays.n_seeds, plays.n_episodes) == (3, 9)
    assert {name for name, n_keep in chosen if n_keep} == {"recent"}


@pytest.mark.parametrize(
    ("flag", "arm"), [(["--positions", "original"], "even@6"), (["--seed", "1"], "full")]
)
def test_positions_and_seed_change_the_returns(home, capsys, flag, arm):
    argv = ["--strategies", "even", "--budgets", "6", "--episodes", "4", "--seeds", "2"]
    main([*argv, "--out", "usual"])
    main([*argv, *flag, "--out", "other"])
    usual, other = (results_of(folder)["arms"] for folder in ("usual", "other"))
    assert usual[arm]["returns"] != other[arm]["returns"]
    is_placed = "old positions where they fit (original)" in capsys.readouterr().out
    assert is_placed == ("original" in flag)
    assert (usual["full"]["returns"] == other["full"]["returns"]) == is_placed


def test_help_names_every_flag_and_strategy(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    flags = "checkpoint positions adapter strategies budgets full seeds episodes confirm margin"
    for name in [*(f"--{flag} " for flag in f"{flags} out device seed".split()), *WITH_BUDGET]:
        assert name in said


# An adapter


def test_with_an_adapter_nothing_of_the_ad_half_is_imported(tmp_path):
    pytest.importorskip("gymnasium")
    argv = ["--adapter", str(ROOT / "examples/sar_mha.py"), "--strategies", "recent"]
    argv += ["--budgets", "5", "--seeds", "1", "--episodes", "2", "--confirm", "0"]
    code = (
        f"import sys, compare_compression as c; c.main({argv!r})\n"
        "assert not {'ad', 'config', 'model', 'dataset'} & sys.modules.keys()"
    )
    assert python("-c", code, cwd=tmp_path, stdout=subprocess.DEVNULL).wait(300) == 0
    assert set(files_of(tmp_path / "figs/compression")) == set(FILES)


@pytest.mark.parametrize(
    "flag", [("--checkpoint", "here"), ("--pos", "original"), ("--positions", "reindexed")]
)
def test_flags_of_checkpoints_have_no_place_beside_an_adapter(home, capsys, flag):
    said = refused(main, ["--adap", "my_model.py", *flag], capsys)
    assert "has no meaning beside --adapter: its load() chooses the model, and its act()" in said


def test_the_usage_of_the_tools_own_command_names_it(capsys):
    with pytest.raises(SystemExit):
        analysis.main(["compare", "--help"])
    assert capsys.readouterr().out.startswith("usage: historylens compare ")


def test_the_tools_own_command_needs_an_adapter(home, capsys):
    assert "expected --adapter FILE" in refused(comparison.main, [], capsys)


# Errors


def rewrite(**changed):
    torch.save(torch.load(CHECKPOINT, weights_only=True) | changed, CHECKPOINT)


def rename_environment():
    config = torch.load(CHECKPOINT, weights_only=True)["config"]
    rewrite(config=config | {"env": "darkroompermuted"})


MISTAKES = {
    "no checkpoint": (CHECKPOINT.unlink, [], "python train.py"),
    "no folder of checkpoints": (None, ["--checkpoint", "nowhere"], "python train.py"),
    "no goals": (lambda: rewrite(goals={}), [], "holds no test goals"),
    "no test goals": (lambda: rewrite(goals={"train": [[0, 0]]}), [], "holds no test goals"),
    "goals of a larger room": (
        lambda: rewrite(goals={"test": [[7, 7]]}), [], "its test goals do not fit its room"
    ),
    "another environment": (rename_environment, [], "'darkroompermuted'"),
    "unknown strategy": (
        None, ["--strategies", "recent", "rewarded"], "unknown strategy 'rewarded': did you mean"
    ),
    "budget beyond the model": (None, ["--budgets", "3", "12"], "expected --budgets in 1..11"),
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
    assert message in refused(main, ["--out", "out", *argv], capsys)
    assert files_of("out") == before


@pytest.mark.parametrize("name", [*FILES, CONFIRMATION])
def test_what_stands_in_the_way_of_a_file_is_one_line(home, capsys, name):
    (home / "out" / name).mkdir(parents=True)
    assert f"{name} is in the way" in refused(main, [*SMALL, "--out", "out"], capsys)


@pytest.mark.parametrize(
    "argv",
    [
        "--budgets 0", "--budgets 3 -2", "--budgets many", "--budgets 1.5", "--seeds 0",
        "--episodes 0", "--margin 2", "--margin -0.1", "--margin nan", "--margin much",
        "--positions old", "--seed -1",
    ],
)  # fmt: skip
def test_a_flag_without_sense_is_an_error_that_names_it(home, capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv.split())
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert argv.split()[0] in err.splitlines()[-1]


# Confirmation


def confirming(n_seeds, margin=0.05):
    """A comparison on the planted task that 2 seeds cannot settle."""
    wanted = {"strategies": ["random"], "budgets": [14], "seeds": 2, "episodes": 8}
    compare(LeversAgent(), CompareConfig(**wanted, confirm=n_seeds, margin=margin))


def test_the_most_promising_arm_is_played_again_where_nothing_is_shown_to_be_safe(home, capsys):
    confirming(24, margin=0.4)
    console = " ".join(capsys.readouterr().out.split())
    summary = results_of("figs/compression")["summary"]
    kept = json.loads(Path("figs/compression/confirmation.json").read_text())
    assert summary["confirmation"]["seeds"] == 24
    assert list(kept["arms"]) == ["full", "random@14"]
    returns = np.array(kept["arms"]["random@14"]["returns"], dtype=float)
    assert returns.shape == (3, 24, 8)
    arm = summary["confirmation"]["rows"][1]
    assert arm["return"] == pytest.approx(late_scores(returns).mean())
    assert arm["verdict"] in ("safe", "better")
    assert summary["recommended"] == "random@14"
    assert "Recommended for this checkpoint: random with 14 transitions" in console
    assert "on 24 new seeds a goal" in console
    assert "results.json, confirmation.json." in console


def test_a_confirmation_is_not_played_twice_and_can_be_left_out(home, monkeypatch, capsys):
    confirming(3)
    first = capsys.readouterr().out.partition("COMPRESSED")[2]
    monkeypatch.setattr(playing, "play", None)
    confirming(3)
    assert capsys.readouterr().out.partition("COMPRESSED")[2] == first
    confirming(0)
    assert "Played again on 3 new seeds a goal" in " ".join(first.split())
    assert "Played again" not in " ".join(capsys.readouterr().out.split())
