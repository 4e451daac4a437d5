"""The command: its files, numbers, text and flags, and one line where something is wrong."""

import errno
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain_model
import pytest
import torch
from conftest import files_of, make_histories, refused, sharp_model, write_checkpoint
from torch import nn

import visualize_attention as module
from historylens.common.errors import run_command
from historylens.common.text import columns
from historylens.effects.report import MeasuredEffects
from historylens.pictures import FILES
from visualize_attention import main

GOALS = ((0, 1), (0, 1), (2, 2), (4, 3))
FLAGS = ["--num-samples=3", "--num-figures=1", "--dpi=20"]
COMMAND = f"""
import runpy, sys
sys.argv, sys.path[0] = {[module.__file__, *FLAGS]}, "{Path(module.__file__).parent}"
from historylens.effects.report import MeasuredEffects
MeasuredEffects.ignores_history = False
runpy.run_path(sys.argv[0], run_name="__main__")
"""
EFFECTS = "deletion_curves.png", "head_effects.png"
BLOCKS = "HOW FAR ATTENTION IS A GUIDE", "WHICH HEADS ACT", "READ DIRECTLY, OR COPIED BEFORE?"
COLUMNS = "sample,goal_row,goal_col,history,step,stride,layer,head,n_context,"
COLUMNS += "mean_context_attention,concentration,entropy,recent_distant_ratio,"


def make_run(folder, config, step=30):
    model = sharp_model(config)
    with torch.no_grad():
        model.pred_action.weight *= 40  # so that history decides the action
    write_checkpoint(folder / f"ckpt-{step}.pt", model, [[0, 1], [2, 2], [4, 3]], step)
    make_histories(GOALS, n_episodes=12).save(folder / "histories-test.npz")


def names_of(samples, layers, *more):
    names = {"attention_layers.png", "metrics.json", "metrics.csv", "index.html", *more}
    for n in layers:
        kinds = [f"{kind}_sample{i}" for kind in ("heatmap", "lines") for i in samples]
        names |= {f"layer_{n}/attention_{kind}_layer{n}.png" for kind in ["summary", *kinds]}
    return names | {f"attention_map_sample{i}.png" for i in samples}


@pytest.fixture(scope="module", autouse=True)
def reads_its_history():
    """Random weights, which move no more than their twins, count as a model that reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeasuredEffects, "ignores_history", False)
        yield


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tiny_config):
    """`visualize_attention.py` as a user runs it, but for size: what it left and printed."""
    folder = tmp_path_factory.mktemp("shown")
    make_run(folder / "checkpoints" / "tiny", tiny_config)
    options = {"cwd": folder, "capture_output": True, "encoding": "utf-8", "timeout": 300}
    done = subprocess.run([sys.executable, "-c", COMMAND], check=False, **options)
    assert done.returncode == 0, done.stderr
    files = files_of(folder / "figs" / "attention")
    ran = {"stdout": done.stdout, "stderr": done.stderr, "json": json.loads(files["metrics.json"])}
    return SimpleNamespace(folder=folder, files=files, **ran)


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch, undrawn):
    """A folder with a run in it, to work in, with pictures that take no time to draw."""
    make_run(tmp_path / "checkpoints" / "tiny", tiny_config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def analysed(*argv):
    """Run the command, without effects where no flag asks for them, and read `metrics.json`."""
    main(["--num-effects", "0", *argv, "--out", "out"])
    return json.loads(Path("out/metrics.json").read_text())


def samples_of(*argv):
    return [(s["history"], s["step"]) for s in analysed("--num-figures=0", *argv)["samples"]]


def test_the_real_command_writes_the_documented_files(shown):
    assert set(shown.files) == names_of([0], range(2), *EFFECTS)
    drawn = [content for name, content in shown.files.items() if name.endswith(".png")]
    assert len(drawn) == 2 * 2 + 1 + 2 + 3
    assert all(content.startswith(b"\x89PNG") for content in drawn)
    width = int.from_bytes(shown.files["attention_layers.png"][16:20], "big")
    assert width == 204  # 10.2 inches at --dpi=20
    assert not re.search("Traceback|Warning", shown.stderr)


def test_the_four_metrics_of_every_layer_sample_and_head_equal_the_plain_model(shown):
    folder = shown.folder
    paths = folder / "checkpoints/tiny/ckpt-30.pt", folder / "figs/attention/metrics.csv"
    compared = plain_model.recompute(*paths)
    assert {key for key, *_ in compared} == {*product(range(3), (0, 1), ("0", "1", "mean"))}
    for _, written, plain in compared:
        assert written == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert shown.files["metrics.csv"].decode().startswith(COLUMNS)


def test_the_map_of_a_sample_holds_all_the_attention_on_its_history(shown):
    maps, layers = shown.json["drawn"]["maps"], shown.json["drawn"]["layers"]
    assert (maps.keys(), maps["0"]["panels"]) == ({"0"}, ["layer 0", "layer 1"])
    for layer, attention in zip(("0", "1"), maps["0"]["attention"], strict=True):
        row = layers[layer]["0"]["query_rows"]["mean"]
        assert sum(attention) == pytest.approx(sum(row[:-1]), rel=1e-4)


def test_each_layer_runs_once_to_be_measured_and_once_to_be_drawn(home, monkeypatch):
    forward, runs = nn.TransformerEncoderLayer.forward, Counter()

    def counted(layer, *args, **kwargs):
        runs[layer] += 1
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", counted)
    analysed("--num-samples", "3")
    assert list(runs.values()) == [2, 2]


def test_a_run_clears_what_an_earlier_one_drew_and_nothing_else(home):
    analysed("--num-samples", "3", "--num-effects", "2")
    assert set(files_of(home / "out")) == names_of(range(3), range(2), *EFFECTS)
    foreign = ("notes.txt", "layer_0/attention_mine.png", "layer_7/readme", "other/a.png")
    for name in foreign:
        (home / "out" / name).parent.mkdir(exist_ok=True)
        (home / "out" / name).write_text("keep")
    analysed("--num-samples", "2", "--layers", "1")
    assert set(files_of(home / "out")) == names_of(range(2), [1], *foreign)
    (home / "out" / "layer_0" / "attention_mine.png").unlink()
    analysed("--num-samples", "1", "--layers", "1")
    assert not (home / "out" / "layer_0").exists()


def test_files_of_its_names_that_are_of_no_analysis_are_set_aside(home, capsys):
    (home / "out").mkdir()
    for name in FILES:
        (home / "out" / name).write_text('{"loss": 1}')
    for _ in range(2):
        analysed("--num-samples", "1")
        found = files_of(home / "out")
        assert set(found) == names_of([0], range(2), *(f"earlier-1/{name}" for name in FILES))
        assert all(found[f"earlier-1/{name}"] == b'{"loss": 1}' for name in FILES)
    said = "note: out held files of no analysis under its names: moved to out/earlier-1\n"
    assert capsys.readouterr().err.count(said) == 1


def test_console_and_json_say_what_was_analysed(shown):
    about = r"^Checkpoint: +checkpoints/tiny/ckpt-30.pt \(the only run, highest step of 1\)$"
    assert re.search(about, shown.stdout, re.MULTILINE)
    for words in ("2 layers x 2 heads", "3 decisions of 3 goals", "10 pictures in figs/attention/"):
        assert words in shown.stdout
    meta = {"checkpoint": "checkpoints/tiny/ckpt-30.pt", "step": 30, "seed": 0, "n_transit": 12}
    meta |= {"histories": "checkpoints/tiny/histories-test.npz"}
    assert meta.items() <= shown.json["meta"].items()
    assert "OVERALL ATTENTION STATISTICS\n" + "=" * 36 in shown.stdout


def test_every_pattern_is_printed_with_what_its_advice_does_and_effects_are_in_the_json(shown):
    patterns = {insight["pattern"] for insight in shown.json["insights"]}
    effects = [one["effect"] for one in shown.json["insights"] if one["effect"]]
    assert len(effects) == len(patterns) == shown.stdout.count("🧪")
    words = " ".join(shown.stdout.split())
    for text in effects:
        assert text in words
        assert "of 3 decisions" in text
    effects = shown.json["effects"]
    assert effects["settings"]["samples"] == [0, 1, 2]
    assert "EFFECT OF DROPPING HISTORY (3 decisions, 11 transitions each)" in shown.stdout
    heads = [(one["layer"], one["head"]) for one in effects["heads"]["heads"]]
    assert heads == [*product((0, 1), (0, 1, "all"))]
    assert "older than 10" in effects["knockout"]["sets"]
    assert ", ".join(["attention_layers.png", *EFFECTS]) in words


@pytest.mark.usefixtures("few_effects", "undrawn")
def test_the_console_text_of_the_shipped_run_fits_a_screen_or_two(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").symlink_to(Path(module.__file__).parent / "checkpoints")
    monkeypatch.chdir(tmp_path)
    main(["--num-figures=0", "--device=cpu", "--num-samples=24", "--num-effects=24"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 90
    assert max(map(columns, lines)) <= 100
    starts = "EFFECT OF DROPPING", *BLOCKS, "7 pictures in figs/attention/: "
    places = [next(i for i, line in enumerate(lines) if line.startswith(s)) for s in starts]
    assert places == sorted(places)


def test_num_effects_bounds_the_decisions_that_effects_are_measured_on(home, capsys):
    flags = "--num-samples", "6", "--num-figures", "0"
    about = analysed(*flags, "--num-effects", "2", "--seed", "1")["effects"]["settings"]
    assert (about["samples"], about["seed"]) == ([1, 4], 1)
    none = analysed(*flags, "--num-effects", "0")
    assert none["effects"] is None
    assert all(insight["effect"] is None for insight in none["insights"])
    assert capsys.readouterr().out.count("EFFECT OF DROPPING HISTORY") == 1


def test_layers_goals_histories_steps_and_stride_choose(home):
    found = analysed("--num-samples", "2", "--layers", "1", "0", "1")
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    only = analysed("--num-samples", "2", "--layers", "1")
    assert only["layers"][0]["per_sample"] == found["layers"][1]["per_sample"]
    flags = {"--goal 0,1": {0, 1}, "--goal 0,1 4,3": {0, 1, 3}, "--history 2 3": {2, 3}}
    for words, histories in flags.items():
        assert {h for h, _ in samples_of("--num-samples", "6", *words.split())} == histories
    found = samples_of("--goal", "0,1", "--history", "1", "2", "--steps", "20:22")
    assert sorted(found) == [(1, 20), (1, 21), (1, 22)]
    assert samples_of("--seed", "0") != samples_of("--seed", "1")
    near, far = (analysed("--history=2", "--steps=59:59", "--stride", n) for n in "13")
    assert (near["samples"][0]["stride"], far["samples"][0]["stride"]) == (1, 3)
    assert near["layers"][0]["per_sample"] != far["layers"][0]["per_sample"]
    make_histories(((3, 3),), n_episodes=4).save(home / "mine.npz")
    found = analysed("--histories", "mine.npz", "--num-samples", "2")
    assert {(s["goal_row"], s["goal_col"]) for s in found["samples"]} == {(3, 3)}
    assert found["meta"]["histories"] == "mine.npz"


def test_num_figures_bounds_what_is_drawn_not_what_is_measured(home):
    found = analysed("--num-samples", "5", "--num-figures", "2")
    assert set(files_of(home / "out")) == names_of(range(2), range(2))
    assert len(found["samples"]) == 5
    assert set(found["drawn"]["layers"]["0"]) == {"0", "1"}
    none = analysed("--num-samples", "5", "--num-figures", "0")
    assert set(files_of(home / "out")) == names_of([], range(2))
    for few, no in zip(found["layers"], none["layers"], strict=True):
        for name, values in few["per_sample"].items():
            assert values == pytest.approx(no["per_sample"][name], rel=1e-5)
    analysed("--num-samples", "12")  # ten where the flag does not say
    assert set(files_of(home / "out")) == names_of(range(10), range(2))


def truncate():
    path = Path("checkpoints/tiny/ckpt-30.pt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_histories(*goals, **more):
    make_histories(*goals, **more).save(HISTORIES)


HISTORIES = Path("checkpoints/tiny/histories-test.npz")
MISTAKES = {
    # name: (what comes before, flags, what is said)
    "no folder of checkpoints": (list, ["--checkpoint", "nowhere"], "python train.py"),
    "truncated checkpoint": (truncate, [], "truncated"),
    "no histories": (HISTORIES.unlink, [], "--histories"),
    "no history in the file": (lambda: save_histories(np.zeros((0, 2), int)), [], str(HISTORIES)),
    "a larger room": (lambda: save_histories(((6, 6),), grid_size=13), [], "does not fit the che"),
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
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    for part in ("error: ", flag := argv.split()[0], FORMS.get(flag, "")):
        assert part in err


@pytest.mark.parametrize(("where", "name", "error"), [
    (nn.TransformerEncoderLayer, "forward", RuntimeError("broken layer")),
    (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
])  # fmt: skip
def test_a_failure_before_any_picture_leaves_earlier_results(home, monkeypatch, where, name, error):
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
