"""The command on a model's own play: its files, its numbers, its flags, adapters, processes."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import test_visualize_attention
from conftest import files_of, refused, run_in_two

from historylens import analysis
from historylens.analysis import results
from historylens.analysis.play import LABELS, record
from historylens.pictures.painter import Painter
from visualize_attention import main

GOALS, DRAW = [(0, 1), (2, 2), (4, 3)], Painter.draw
EXAMPLES = Path(__file__).parent.parent / "examples"
FLAGS = "--num-effects=0 --dpi=20 --device=cpu --episodes=2 --rollouts=1 --out=out"
home = test_visualize_attention.home  # with pictures that take no time to draw
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def written(*argv, run=main):
    run([*FLAGS.split(), *argv])
    rows = csv.DictReader(Path("out/metrics.csv").read_text().splitlines())
    return json.loads(Path("out/metrics.json").read_text()), list(rows)


def names_of(samples, layers, steps=()):
    """Names of all files of a run that follows rollout 1 if any, as documented."""
    names = test_visualize_attention.names_of(samples, layers, "attention_over_learning.png")
    names |= {f"trajectory_1/attention_over_time.{x}" for x in ("png", "npz") if steps}
    for n, kind in product(layers, ("heatmap", "lines")):
        start = f"trajectory_1/layer_{n}/attention_{kind}_timestep"
        names |= {f"{start}{t}_layer{n}.png" for t in steps}
    return names


def test_it_draws_what_is_documented_and_two_processes_write_the_same(home, monkeypatch, capfd):
    monkeypatch.setattr(Painter, "draw", DRAW)
    argv = "--num-samples=30 --num-figures=1 --layers=1 --trajectory=1 --every=9"
    found, rows = written(*argv.split())
    one, (out, err) = files_of(home / "out"), capfd.readouterr()
    assert set(one) == names_of([0], [1], [0, 9])
    assert all(data.startswith(b"\x89PNG") for name, data in one.items() if name.endswith("png"))
    words = {"note:", "nan", "inf", "-inf", "None", "Traceback"}
    assert not words & {*(out + err).replace(".", " ").split()}
    assert "OVER 2 EPISODES OF ITS OWN PLAY (3 rollouts, 30 decisions)" in out
    assert found["learning"]["by_episode"]["rollouts"] == [3, 3]
    assert [*rows[0]][:8] == ["sample", *LABELS, "layer", "head", "n_context"]
    assert len({(row["rollout"], row["step"]) for row in rows}) == 30
    for row in rows:
        n, step, i = (int(row[name]) for name in ("n_context", "step", "rollout"))
        assert (n, row["task"], row["episode"]) == (step, str(GOALS[i]), f"{step // 5 + 1}")
    (home / "two").mkdir()
    (home / "checkpoints").rename(home / "two/checkpoints")
    monkeypatch.chdir(home / "two")
    run_in_two(main, f"{FLAGS} {argv}".split())
    two = files_of(home / "two/out")
    assert two == one | {"index.html": two["index.html"]}  # which says how many there were


def test_a_rollout_is_followed_and_its_files_go_with_the_next_run(home, monkeypatch):
    plays, mine = [], home / "out/trajectory_1/layer_1/mine.png"
    monkeypatch.setattr(results, "record", lambda job: plays.append(record(job)) or plays[-1])
    argv = ["--num-samples=4", "--num-figures=2", "--trajectory=1", "--every=3"]
    found, _ = written(*argv)
    assert set(files_of(home / "out")) == names_of([0, 1], [0, 1], [0, 3, 6, 9])
    with np.load("out/trajectory_1/attention_over_time.npz") as file:
        np.testing.assert_array_equal(file["rows"], plays[0].rows)
        assert (file["episode_starts"].tolist(), file["layers"].tolist()) == ([0, 5], [0, 1])
        assert file["rewarded"].tolist() == (plays[0].rewards[1] > 0).tolist()
    assert found["samples"][3]["title"] == plays[0].choose(4, 0)[3].title
    mine.write_text("keep")
    written("--play", "--num-samples=4", "--num-figures=1")
    left = names_of([0], [0, 1]) | {"trajectory_1/layer_1/mine.png"}
    assert set(files_of(home / "out")) == left
    assert not (mine.parents[1] / "layer_0").exists()


ADAPTER = f"--play --adapter {EXAMPLES / 'explicit_softmax.py'}"
OF_HISTORIES = "--histories some.npz", "--goal 0,1", "--history 0", "--steps 0:9", "--stride 2"
REFUSED = {f"--play {x}": f"{x.split()[0]} has no meaning beside --play" for x in OF_HISTORIES} | {
    "--trajectory 3": "expected --trajectory in 0..2, a rollout, got 3",
    ADAPTER: "explicit_softmax.py: no make_env()",
    f"{ADAPTER} --goal 0,1": "--goal has no meaning beside --adapter",
    f"--play --episodes={2**53}": "lower --episodes or --rollouts",
    f"--play --rollouts={2**53}": "lower --episodes or --rollouts",
    "--dpi=1001": "expected --dpi of at most 1000, got 1001",
}


@pytest.mark.parametrize("argv", REFUSED)
def test_a_flag_without_sense_is_one_line(home, capsys, argv):
    assert REFUSED[argv] in refused(main, f"{FLAGS} {argv}".split(), capsys)
    assert not files_of(home / "out")


@pytest.mark.parametrize("name", ["episodes", "rollouts", "every"])
def test_flags_of_own_play_need_it(home, capsys, name):
    said = refused(main, [f"--{name}=3", "--out=out"], capsys)
    assert said == f"error: --{name} is of the model's own play; give --play as well"
    assert not files_of(home / "out")


def test_an_adapter_with_an_environment_plays(home):
    pytest.importorskip("gymnasium")
    flags = "--play --trajectory=1 --num-samples=30 --num-figures=0 --adapter"
    found, rows = written(*flags.split(), str(EXAMPLES / "sar_mha.py"), run=analysis.main)
    assert {row["task"] for row in rows} == {"left end", "right end"}
    assert found["learning"]["n_decisions"] == 40
    with np.load("out/trajectory_1/attention_over_time.npz") as file:
        assert file["rows"].shape == (20, 2, 31)
