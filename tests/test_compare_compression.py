"""The command: its files, console text, flags, interruptions and errors."""

import csv
import io
import json
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from agents import ModelAgent, Recorder
from conftest import files_of, refused, sharp_model, without_drawing, write_checkpoint
from levers import N_MAX, Levers, LeversAgent, rewarded_only

from compare_compression import main
from historylens import analysis, comparison
from historylens.agent import Environment
from historylens.common.errors import run_command
from historylens.comparison import WITH_BUDGET, CompareConfig, compare, playing
from historylens.comparison.intervals import late_scores, looks
from historylens.comparison.results import CONFIRMATION, FILES

CHECKPOINT = Path("checkpoints/tiny/ckpt-30.pt")
FIGS = Path("figs/compression")
OTHERS = (".pdf", ".svg")  # formats that are not asked for
GOALS = [[0, 1], [2, 2], [4, 3]]
SMALL = ["--strategies", "recent", "random", "top-k", "--budgets", "3", "6",
         "--seeds", "2", "--episodes", "3", "--confirm", "0", "--device", "cpu"]  # fmt: skip
ARMS = ["empty", "full", "other-task", "random@3", "random@6", "recent@3", "recent@6",
        "shuffled-rewards", "top-k@3", "top-k@6"]  # fmt: skip


def at_home(folder, config, patch):
    """A folder with a run in it, to work in; pictures are not drawn."""
    write_checkpoint(folder / CHECKPOINT, sharp_model(config), GOALS, step=30)
    patch.chdir(folder)
    without_drawing(patch)
    return folder


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch):
    return at_home(tmp_path, tiny_config, monkeypatch)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_config):
    """The folder of a small comparison, and what the command prints."""
    with pytest.MonkeyPatch.context() as patch:
        folder = at_home(tmp_path_factory.mktemp("done"), tiny_config, patch)
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            main(SMALL)
    return folder, out.getvalue(), err.getvalue()


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def returns_of(content, key):
    """The returns `(G, r, E)` of all blocks of an arm."""
    return np.concatenate([block["returns"] for block in content["arms"][key]["blocks"]], axis=1)


def table_of(folder):
    return list(csv.DictReader((Path(folder) / "results.csv").read_text().splitlines()))


def timeless(folder):
    """The files of a comparison without what clocks measured: two last columns of the table."""
    clocks = rb'"(ms|seconds)_\w+": [-.e\d]+|,[-.e\d]+,[-.e\d]+$'
    return {name: re.sub(clocks, b"", each, flags=re.M) for name, each in files_of(folder).items()}


def test_the_console_ends_in_one_recommendation_and_files_hold_every_return(done):
    folder, out, err = done
    for said in (
        "checkpoints/tiny/ckpt-30.pt (the only run, highest step of 1)", "10 arms, 900 decisions",
        "Margin:     5% of full history's return", "numbered anew (reindexed)",
        *(f"\n{key} " for key in ARMS),
    ):  # fmt: skip
        assert said in out
    assert out.count("\n=> ") == 1
    assert "900/900" in err
    assert not re.search("Traceback|Warning", err)
    assert set(files_of(folder / FIGS)) == {name for name in FILES if not name.endswith(OTHERS)}
    result, table = results_of(folder / FIGS), table_of(folder / FIGS)
    assert result["complete"]
    assert list(result["arms"]) == ARMS
    returns = np.array([returns_of(result, key) for key in ARMS])
    assert returns.shape == (10, 3, 2, 3)  # arms, goals, seeds, episodes
    for row, record in zip(table, result["summary"]["rows"], strict=True):
        key = row["strategy"] + (f"@{row['budget']}" if row["budget"] else "")
        late = returns[ARMS.index(key)][:, :, 1:].mean()
        assert float(row["return"]) == record["return"] == pytest.approx(late)
        assert record["tokens_per_decision"] > 0
        [block] = result["arms"][key]["blocks"]
        assert (block["first_seed"], block["cost"]["identical_to_full"]) == (0, 0)
        assert record["budget"] in (None, record["kept"])
    assert len(table) == 10
    assert (result["summary"]["step"], result["summary"]["positions"]) == (30, "reindexed")


def test_a_stopped_comparison_goes_on_to_the_same_files(done, home, monkeypatch, capsys):
    argv, out, play = [*SMALL, "--out", "out"], Path("out"), playing.play
    order = ["top-k@6", "top-k@3", "full", "other-task", "shuffled-rewards", "recent@6",
             "random@6", "recent@3", "random@3", "empty"]  # what takes longest first  # fmt: skip

    def stopping(plays, arm, *rest):
        stop = arm.key == order[5]
        return signal.raise_signal(signal.SIGINT) if stop else play(plays, arm, *rest)

    monkeypatch.setattr(playing, "play", stopping)
    with pytest.raises(SystemExit, match="130"):
        run_command(lambda: main(argv))
    assert (set(files_of(out)), set(results_of(out)["arms"])) == ({"results.json"}, {*order[:5]})
    kept = "5 blocks of runs are kept in out/results.json"
    assert f"\n{kept}: the same command goes on from there\n" in capsys.readouterr().err
    monkeypatch.setattr(playing, "play", play)
    main(argv)
    assert "5 arms, 450 decisions" in capsys.readouterr().out
    assert timeless(out) == timeless(done[0] / FIGS)
    monkeypatch.setattr(playing, "play", None)
    before = files_of(out)
    main(argv)
    assert files_of(out) == before
    said = " ".join(capsys.readouterr().out.split())
    assert "results.json has 10 blocks of runs of 10 arms of these settings" in said
    assert "0 arms, 0 decisions" in said


def test_more_strategies_play_only_what_is_missing_and_a_new_margin_nothing(home, capsys):
    tiny = ["--budgets", "3", "--episodes", "2", "--seeds", "2", "--out", "out"]
    main([*tiny, "--strategies", "recent"])
    main([*tiny, "--strategies", "recent", "even", "--margin", "0.2"])
    assert "1 arm, 60 decisions" in capsys.readouterr().out
    assert results_of("out")["summary"]["margin_share"] == 0.2
    assert {row["strategy"] for row in table_of("out")} >= {"recent", "even"}
    main([*tiny, "--strategies", "even"])
    assert "recent@3" in results_of("out")["arms"]  # kept, though not asked for this time
    assert "recent" not in {row["strategy"] for row in table_of("out")}


def test_results_are_of_other_code_where_any_has_changed_that_runs_while_an_arm_is_played(
    home, monkeypatch
):
    root, ran, known = Path(comparison.__file__).parents[2], set(), set()

    def traced(*args, real=playing.play):
        sys.setprofile(lambda frame, *_: ran.add(frame.f_code.co_filename))
        try:
            return real(*args)
        finally:
            sys.setprofile(None)

    def read(path, real=Path.read_bytes):
        known.add(path)
        return real(path)

    monkeypatch.setattr(playing, "play", traced)
    monkeypatch.setattr(Path, "read_bytes", read)
    main(["--strategies", *WITH_BUDGET, "--budgets=3", "--seeds=1", "--episodes=2", "--confirm=0"])
    ran = {path for path in map(Path, ran) if "site-packages" not in path.parts}
    ours = {path for path in ran - known if root in path.parents}
    others = {path.relative_to(root).as_posix() for path in ours if path != Path(__file__)}
    kept = "common/batches.py", "common/errors.py", "common/processes.py", "comparison/study.py"
    assert others == {f"historylens/{name}" for name in kept}  # sizes, messages, names of arms


def test_what_is_not_chosen_is_quick_or_all_with_full(home, tiny_model, monkeypatch, capsys):
    def stop(plays, arms, *rest):
        kept = {(arm.name, arm.n_keep) for arm in arms if arm.n_keep}
        raise KeyboardInterrupt(kept, (plays.n_seeds, plays.n_episodes))

    def planned(**settings):
        with pytest.raises(KeyboardInterrupt) as stopped:
            compare(agent, CompareConfig(**settings))
        said = capsys.readouterr()
        assert "goes on from there" not in said.err  # nothing was played
        return *stopped.value.args, said.out

    monkeypatch.setattr(comparison, "play_arms", stop)
    agent = ModelAgent(tiny_model, Environment(("a", "b"), 5, Levers))
    arms, _, said = planned()
    assert {n_keep for _, n_keep in arms} == {10, 11}
    assert "10, 11 of up to 11 transitions (the usual 20, 40, 100 exceed" in said
    quick, sizes, said = planned(budgets=[3])
    assert (sizes, "the usual" in said) == ((4, 24), False)
    every = {(name, 3) for name in WITH_BUDGET}
    assert planned(budgets=[3], full=True)[:2] == (every, (16, 40))
    assert quick < every
    chosen = planned(budgets=[3], full=True, strategies=["recent"], seeds=3, episodes=9)
    assert chosen[:2] == ({("recent", 3)}, (3, 9))


def test_positions_and_seed_change_the_returns_and_what_is_in_the_way_is_one_line(home, capsys):
    argv = ["--strategies=even", "--budgets=6", "--episodes=4", "--seeds=2", "--confirm=0"]
    placed, full, even = "old positions where they fit (original)", [], []
    for flag in ("--positions=reindexed", "--positions=original", "--seed=1"):
        main([*argv, flag, f"--out={flag}"])
        assert (placed in capsys.readouterr().out) == ("original" in flag)
        full.append(returns_of(results_of(flag), "full").tolist())
        even.append(returns_of(results_of(flag), "even@6").tolist())
    assert full[0] == full[1] != full[2]
    assert even[0] not in even[1:]
    for name in FILES[:-1]:
        Path("out", name).mkdir(parents=True)
        assert f"{name} is in the way" in refused(main, [*SMALL, "--out", "out"], capsys)
        Path("out", name).rmdir()


def test_help_names_all_and_the_tools_own_command_needs_an_adapter_alone(home, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    flags = "checkpoint positions adapter strategies budgets full seeds episodes confirm margin"
    for name in [*(f"--{flag} " for flag in f"{flags} out device seed".split()), *WITH_BUDGET]:
        assert name in said
    with pytest.raises(SystemExit):
        analysis.main(["compare", "--help"])
    assert capsys.readouterr().out.startswith("usage: historylens compare ")
    assert "expected --adapter FILE" in refused(comparison.main, [], capsys)
    for flag in (("--checkpoint", "here"), ("--pos", "original"), ("--positions", "reindexed")):
        said = refused(main, ["--adap", "my_model.py", *flag], capsys)
        assert "has no meaning beside --adapter: its load() chooses the model, and its act" in said


def rewrite(env="darkroom", **changed):
    content = torch.load(CHECKPOINT, weights_only=True)
    content["config"]["env"] = env
    torch.save(content | changed, CHECKPOINT)


def an_analysis():
    Path("analysis").mkdir()
    Path("analysis/metrics.json").write_text('{"schema": "attention-metrics"}')


@pytest.mark.parametrize(("argv", "message", "prepare"), [
    ("--checkpoint nowhere", "python train.py", None),
    ("", "holds no test goals", lambda: rewrite(goals={"train": [[0, 0]]})),
    ("", "its goals do not fit its room", lambda: rewrite(goals={"test": [[7, 7]]})),
    ("", "'darkroompermuted'", lambda: rewrite("darkroompermuted")),
    ("--strategies recent rewarded", "unknown strategy 'rewarded': did you mean", None),
    ("--strategies other-task", "unknown strategy 'other-task'", None),  # that is a control
    ("--strategies full empty", "expected --strategies beside full and empty", None),
    ("--strategies head-0-9 --budgets 3", "a head in 0..1, got 'head-0-9'", None),
    ("--budgets 3 12", "expected --budgets in 1..11", None),
    ("--out analysis", "holds results of the analysis (metrics.json): choose another", an_analysis),
    ("--checkpoint=", "expected --checkpoint not to be empty", None),
    ("--out file/a", "output folder file/a ", Path("file").touch),
    ("--device abacus", "expected a --device of this machine", None),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_earlier_results(home, capsys, argv, message, prepare):
    Path("out").mkdir()
    for name in FILES:
        Path("out", name).write_text("earlier")
    before = files_of(Path("out"))
    if prepare is not None:
        prepare()
    assert message in refused(main, ["--out", "out", *argv.split()], capsys)
    assert files_of(Path("out")) == before


@pytest.mark.parametrize("argv", [
    "--budgets 0", "--budgets 3 -2", "--budgets many", "--seeds 0", "--episodes 0", "--margin 2",
    "--positions old", "--seed -1",
])  # fmt: skip
def test_a_flag_without_sense_is_an_error_that_names_it(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: main(argv.split()))
    out, err = capsys.readouterr()
    assert (out, argv.split()[0] in err, err.count("\n")) == ("", True, 1)


def test_what_looks_at_what_the_model_does_not_show_is_left_out_and_alone_ends_in_a_line(
    home, capsys
):
    agent = Recorder(N_MAX, rewarded_only)  # heads without a projection
    agent.environment = LeversAgent().environment

    def compared(*names, full=False):
        sizes = {"budgets": [3], "seeds": 1, "episodes": 2, "confirm": 0}
        compare(agent, CompareConfig(strategies=[*names] or None, full=full, **sizes))

    reason = "tiny: expected heads side by side before a linear projection, as contributions take"
    said = refused(lambda names: compared(*names), ["norm", "contribution"], capsys)
    assert f"nothing is left to compare without norm, contribution: {reason}" in said
    assert not FIGS.exists()
    for _ in range(2):  # the second time all others are finished
        compared(full=True)
        out, err = capsys.readouterr()
        assert err.count(f"note: without norm, contribution: {reason}") == err.count("note: ") == 1
        assert out.count("\n=> ") == 1
        played = {name.split("@")[0] for name in results_of(FIGS)["arms"]}
        assert played & {*WITH_BUDGET} == {*WITH_BUDGET} - {"norm", "contribution"}
    compared("recent", "head-0-0")
    assert "note" not in capsys.readouterr().err
    assert "head-0-0" in {row["strategy"] for row in table_of(FIGS)}


def test_the_most_promising_of_unsettled_arms_is_played_again_once(home, monkeypatch, capsys):
    def confirming(n_seeds, margin=0.05, **more):  # on the planted task: 2 seeds do not settle it
        wanted = {"strategies": ["random"], "budgets": [14], "seeds": 2, "episodes": 8} | more
        compare(LeversAgent(), CompareConfig(**wanted, confirm=n_seeds, margin=margin))
        return " ".join(capsys.readouterr().out.partition("COMPRESSED")[2].split())

    console, summary = confirming(24, margin=0.4, no_racing=True), results_of(FIGS)["summary"]
    kept, arm = json.loads((FIGS / CONFIRMATION).read_text()), summary["confirmation"]["rows"][1]
    assert kept["fingerprint"]["seed"] != summary["seed"]
    assert list(kept["arms"]) == ["full", "random@14"]
    assert len(kept["arms"]["full"]["blocks"]) == len(looks(24)) == 4  # none beyond a look
    returns = returns_of(kept, "random@14")
    assert returns.shape == (3, 24, 8)
    assert arm["return"] == pytest.approx(late_scores(returns).mean())
    assert arm["verdict"] in ("safe", "better")
    assert (summary["confirmation"]["seeds"], summary["recommended"]) == (24, "random@14")
    for said in ("Recommended for this checkpoint: random with 14 transitions",
                 "on 24 new seeds a goal", "results.json, confirmation.json."):  # fmt: skip
        assert said in console
    with mock.patch.object(comparison, "confirm", side_effect=comparison.confirm) as judged:
        sooner = confirming(24, margin=0.4)  # at a look
    (early,) = set(looks(24)) & set(map(int, re.findall(r"on (\d+) new seeds a goal", sooner)))
    assert early < 24
    assert judged.call_args.args[-1] == looks(24)[early]
    assert results_of(FIGS)["summary"]["confirmation"]["seeds"] == early
    first = confirming(3)
    monkeypatch.setattr(playing, "play", None)
    assert confirming(3) == first
    assert "Played again on 3 new seeds a goal" in first
    assert "Played again" not in confirming(0)
