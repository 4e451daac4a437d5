"""The command: its files, its numbers, its console text, its flags and its errors."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import plain_model
import pytest
import torch
from conftest import make_histories, n_hooks, refused, sharp_model
from torch import nn

import ad.agent
import visualize_attention as module
from ad.checkpoints import save_checkpoint
from config import EnvConfig
from historylens.analysis import job
from historylens.common.settings import to_dict
from historylens.pictures import curveplot
from historylens.pictures.painter import Painter
from visualize_attention import main

GOALS = ((0, 1), (0, 1), (2, 2), (4, 3))
COLUMNS = [
    "sample", "goal_row", "goal_col", "history", "step", "stride", "layer", "head", "n_context",
    "mean_context_attention", "concentration", "entropy", "recent_distant_ratio",
]  # fmt: skip


def content_of(config, step=30):
    model = sharp_model(config).state_dict()
    model["pred_action.weight"] *= 40  # so that history decides the action
    return {
        "step": step,
        "config": to_dict(config, EnvConfig(grid_size=5, horizon=5)),
        "model": model,
        "optimizer": None,
        "lr_sched": None,
        "goals": {"train": [[0, 0]], "validation": [[1, 2]], "test": [[0, 1], [2, 2], [4, 3]]},
    }


def make_run(folder, config, step=30):
    save_checkpoint(folder / f"ckpt-{step}.pt", content_of(config, step))
    make_histories(GOALS, n_episodes=12).save(folder / "histories-test.npz")
    return folder


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pictures(samples, layers):
    """Names of all files of a run, as documented."""
    names = {"attention_layers.png", "deletion_curves.png", "metrics.json", "metrics.csv"}
    for n in layers:
        names.add(f"layer_{n}/attention_summary_layer{n}.png")
        for i in samples:
            names.add(f"layer_{n}/attention_heatmap_sample{i}_layer{n}.png")
            names.add(f"layer_{n}/attention_lines_sample{i}_layer{n}.png")
    return names


@dataclass
class Shown:
    """A real run in `folder`, with what was printed and how often each layer ran."""

    folder: Path
    stdout: str
    runs: Counter
    models: list

    @property
    def files(self):
        return files_of(self.folder / "figs" / "attention")

    @property
    def json(self):
        return json.loads(self.files["metrics.json"])

    @property
    def csv(self):
        return list(csv.DictReader(io.StringIO(self.files["metrics.csv"].decode())))


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tiny_config) -> Shown:
    """`python visualize_attention.py` as a user runs it, but for size."""
    folder = tmp_path_factory.mktemp("shown")
    make_run(folder / "checkpoints" / "tiny", tiny_config)
    forward, load = nn.TransformerEncoderLayer.forward, ad.agent.load_checkpoint
    seen = Shown(folder, "", Counter(), [])

    def counted(layer, *args, **kwargs):
        seen.runs[layer] += 1
        return forward(layer, *args, **kwargs)

    def loaded(*args):
        checkpoint = load(*args)
        seen.models.append(checkpoint.model)
        return checkpoint

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(nn.TransformerEncoderLayer, "forward", counted)
        patch.setattr(ad.agent, "load_checkpoint", loaded)
        main(["--num-samples", "3", "--dpi", "40"])
    seen.stdout = out.getvalue()
    return seen


@pytest.fixture
def home(tmp_path, tiny_config, monkeypatch):
    """A folder with a run in it, to work in, with pictures that take no time to draw."""
    make_run(tmp_path / "checkpoints" / "tiny", tiny_config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Painter, "draw", lambda _, draw, path, *a, **k: path.write_bytes(b"png"))
    monkeypatch.setattr(curveplot, "deletion_curves", lambda path, **_: path.write_bytes(b"png"))
    return tmp_path


def analysed(*argv):
    """Run the command and read `metrics.json`."""
    main([*argv, "--out", "out"])
    return json.loads(Path("out/metrics.json").read_text())


def samples_of(*argv):
    return [(s["history"], s["step"]) for s in analysed(*argv)["samples"]]


# What a run leaves


def test_files_are_named_as_documented(shown):
    assert set(shown.files) == pictures(range(3), range(2))
    drawn = {name for name in shown.files if name.endswith(".png")}
    assert len(drawn) == 2 * 3 * 2 + 2 + 2
    assert all(shown.files[name].startswith(b"\x89PNG") for name in drawn)


def test_the_four_metrics_of_every_layer_sample_and_head_equal_the_plain_model(shown):
    folder = shown.folder
    compared = plain_model.recompute(
        folder / "checkpoints/tiny/ckpt-30.pt", folder / "figs/attention/metrics.csv"
    )
    heads = {(s, layer, head) for s in range(3) for layer in (0, 1) for head in ("0", "1", "mean")}
    assert {key for key, _, _ in compared} == heads
    for _, written, plain in compared:
        assert written == pytest.approx(plain, rel=1e-5, abs=1e-5)


def test_csv_columns_come_in_the_agreed_order(shown):
    header = shown.files["metrics.csv"].decode().split("\n")[0].split(",")
    assert header[: len(COLUMNS)] == COLUMNS
    assert len(set(header)) == len(header)


def test_json_and_csv_agree(shown):
    layers = {layer["layer"]: layer for layer in shown.json["layers"]}
    averages = [row for row in shown.csv if row["head"] == "mean"]
    assert len(averages) == 6
    for row in averages:
        values = layers[int(row["layer"])]["per_sample"]
        for name in values:
            assert values[name][int(row["sample"])] == float(row[name])
        sample = shown.json["samples"][int(row["sample"])]
        for name in ("goal_row", "goal_col", "history", "step", "stride", "n_context"):
            assert sample[name] == int(row[name])
    for layer in layers.values():
        for name in COLUMNS[9:]:
            per_sample = [float(r[name]) for r in averages if int(r["layer"]) == layer["layer"]]
            assert layer["over_samples"][name]["mean"] == pytest.approx(np.mean(per_sample))
            assert layer["over_samples"][name]["std"] == pytest.approx(np.std(per_sample))


def test_json_says_what_was_analysed(shown):
    meta = shown.json["meta"]
    assert meta["checkpoint"] == "checkpoints/tiny/ckpt-30.pt"
    assert meta["histories"] == "checkpoints/tiny/histories-test.npz"
    assert meta["device"] in ("cpu", "cuda")
    assert (meta["step"], meta["seed"], meta["n_transit"]) == (30, 0, 12)


def test_each_layer_runs_once_to_be_shown_and_once_to_be_judged_and_no_hook_is_left(shown):
    (model,) = shown.models
    layers = list(model.transformer_encoder.layers)
    assert [shown.runs[layer] for layer in layers] == [2, 2]
    assert sum(shown.runs.values()) == 4
    assert n_hooks(model) == 0


def test_the_same_command_writes_the_same_bytes(shown, monkeypatch):
    monkeypatch.chdir(shown.folder)
    before = shown.files
    main(["--num-samples", "3", "--dpi", "40"])
    assert shown.files == before


def test_a_run_clears_what_an_earlier_one_drew_and_nothing_else(home):
    analysed("--num-samples", "3")
    assert set(files_of(home / "out")) == pictures(range(3), range(2))
    foreign = ("notes.txt", "layer_0/mine.png", "layer_7/readme", "other/attention_lines_x.png")
    for name in foreign:
        (home / "out" / name).parent.mkdir(exist_ok=True)
        (home / "out" / name).write_text("keep")
    analysed("--num-samples", "2", "--layers", "1")
    assert set(files_of(home / "out")) == pictures(range(2), [1]) | set(foreign)
    (home / "out" / "layer_0" / "mine.png").unlink()
    analysed("--num-samples", "1", "--layers", "1")
    assert not (home / "out" / "layer_0").exists()


# Console


def test_console_says_what_was_loaded(shown):
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("Checkpoint:")]
    assert "checkpoints/tiny/ckpt-30.pt (the only run, highest step of 1)" in line
    assert "2 layers x 2 heads" in shown.stdout
    assert "11 transitions" in shown.stdout
    assert "3 decisions of 3 goals" in shown.stdout
    assert "15 pictures" not in shown.stdout
    assert "16 pictures in figs/attention/" in shown.stdout


def test_console_has_the_overall_block_with_the_numbers_of_the_json(shown):
    overall = shown.json["overall"]
    lines = shown.stdout.splitlines()
    start = lines.index("OVERALL ATTENTION STATISTICS")
    assert lines[start + 1] == "=" * 36
    labels = ("Mean context attention", "Attention concentration (std)", "Attention entropy")
    for i, (label, name) in enumerate(zip(labels, COLUMNS[9:12], strict=True)):
        mean, std = overall[name]["mean"], overall[name]["std"]
        assert lines[start + 2 + i] == f"{label}: {mean:.4f} ± {std:.4f}"
    assert re.match(r"Recent/Distant ratio: \S+.* ± \S+", lines[start + 5])


def test_console_has_an_insight(shown):
    assert any(line.startswith("💡 INSIGHT: ") for line in shown.stdout.splitlines())


# What dropping history does


def test_every_pattern_is_printed_with_what_its_advice_does(shown):
    patterns = {insight["pattern"] for insight in shown.json["insights"]}
    effects = [one["effect"] for one in shown.json["insights"] if one["effect"]]
    assert len(effects) == len(patterns) == shown.stdout.count("🧪")
    words = " ".join(shown.stdout.split())
    for text in effects:
        assert text in words
        assert "of 3 decisions" in text


def test_effects_are_in_the_json_and_in_tables_on_the_console(shown):
    effects = shown.json["effects"]
    assert effects["settings"]["samples"] == [0, 1, 2]
    assert effects["settings"]["n_context"] == 11
    assert {"recent", "even", "top-k", "random", "least-attended"} <= set(effects["strategies"])
    for pattern in {insight["pattern"] for insight in shown.json["insights"]}:
        advised = [e for e in effects["strategies"].values() if pattern in e["advised_by"]]
        assert advised
    assert [layer["layer"] for layer in effects["faithfulness"]["layers"]] == [0, 1]
    assert "EFFECT OF DROPPING HISTORY (3 decisions, 11 transitions each)" in shown.stdout
    assert "HOW FAR ATTENTION IS A GUIDE" in shown.stdout
    assert "deletion_curves.png shows the effect of dropping history" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_num_effects_bounds_the_decisions_that_effects_are_measured_on(home, capsys):
    found = analysed("--num-samples", "6", "--num-effects", "2", "--num-figures", "0")
    assert found["effects"]["settings"]["samples"] == [1, 4]
    none = analysed("--num-samples", "6", "--num-effects", "0", "--num-figures", "0")
    assert none["effects"] is None
    assert all(insight["effect"] is None for insight in none["insights"])
    assert not (home / "out" / "deletion_curves.png").exists()
    console = capsys.readouterr().out.split("EFFECT OF DROPPING HISTORY")
    assert len(console) == 2
    assert "deletion_curves.png" not in console[1].split("Checkpoint:")[1]


def test_the_seed_decides_what_is_drawn_at_random(home):
    flags = ("--history", "2", "--steps", "30:32", "--num-figures", "0")
    one, same, other = (analysed(*flags, "--seed", seed)["effects"] for seed in "001")
    assert one == same
    random = [found["strategies"]["random"]["sizes"] for found in (one, other)]
    assert random[0] != random[1]
    recent = [[s["kl_mean"] for s in e["strategies"]["recent"]["sizes"]] for e in (one, other)]
    assert recent[0] == recent[1]


def test_the_latest_checkpoint_is_of_the_run_last_written_and_the_highest_number(
    home, tiny_config, capsys
):
    for run, steps, age in (("old", (100_000,), 100), ("new", (900, 1000), 0)):
        for step in steps:
            make_run(home / "checkpoints" / run, tiny_config, step)
            path = home / "checkpoints" / run / f"ckpt-{step}.pt"
            os.utime(path, (2_000_000_000 - age - step % 1000,) * 2)
    meta = analysed("--num-samples", "1")["meta"]
    assert (meta["checkpoint"], meta["step"]) == ("checkpoints/new/ckpt-1000.pt", 1000)
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/new/ckpt-1000.pt (last written of 3 runs, highest step of 2)" in out
    meta = analysed("--num-samples", "1", "--checkpoint", "checkpoints/old")["meta"]
    assert meta["step"] == 100_000


# Flags


def test_layers_chooses_layers_in_ascending_order_once(home):
    found = analysed("--num-samples", "2", "--layers", "1", "0", "1")
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    only = analysed("--num-samples", "2", "--layers", "1")
    assert only["layers"][0]["per_sample"] == found["layers"][1]["per_sample"]


def test_goal_history_and_steps_filter_the_decisions(home):
    assert {h for h, _ in samples_of("--num-samples", "6", "--goal", "0,1")} == {0, 1}
    assert {h for h, _ in samples_of("--goal", "0,1", "4,3", "--num-samples", "6")} == {0, 1, 3}
    assert {h for h, _ in samples_of("--num-samples", "6", "--history", "2", "3")} == {2, 3}
    found = samples_of("--goal", "0,1", "--history", "1", "2", "--steps", "20:22")
    assert sorted(found) == [(1, 20), (1, 21), (1, 22)]


def test_stride_reaches_further_back(home):
    near = analysed("--history", "2", "--steps", "59:59")
    far = analysed("--history", "2", "--steps", "59:59", "--stride", "3")
    assert (near["samples"][0]["stride"], far["samples"][0]["stride"]) == (1, 3)
    assert near["layers"][0]["per_sample"] != far["layers"][0]["per_sample"]


def test_seed_chooses_the_decisions(home):
    one, same, other = (samples_of("--seed", seed, "--num-samples", "5") for seed in "001")
    assert one == same != other


def test_num_figures_bounds_what_is_drawn_not_what_is_measured(home):
    found = analysed("--num-samples", "5", "--num-figures", "2")
    assert set(files_of(home / "out")) == pictures(range(2), range(2))
    assert len(found["samples"]) == 5
    assert set(found["drawn"]["layers"]["0"]) == {"0", "1"}
    none = analysed("--num-samples", "5", "--num-figures", "0")
    assert set(files_of(home / "out")) == pictures([], range(2))
    for few, no in zip(found["layers"], none["layers"], strict=True):
        assert few["per_sample"].keys() == no["per_sample"].keys()
        for name, values in few["per_sample"].items():
            assert values == pytest.approx(no["per_sample"][name], rel=1e-5)


def test_not_more_than_the_limit_is_drawn_unless_asked_for(home, monkeypatch):
    monkeypatch.setattr(job, "MAX_FIGURES", 2)
    analysed("--num-samples", "4")
    assert set(files_of(home / "out")) == pictures(range(2), range(2))
    analysed("--num-samples", "4", "--num-figures", "3")
    assert set(files_of(home / "out")) == pictures(range(3), range(2))


def test_dpi_scales_the_pictures(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(shown.folder)
    argv = ["--num-samples", "1", "--num-figures", "0", "--layers", "0", "--out", str(tmp_path)]
    main([*argv, "--dpi", "20"])
    small = width_of((tmp_path / "attention_layers.png").read_bytes())
    assert width_of(shown.files["attention_layers.png"]) == pytest.approx(2 * small, abs=2)


def width_of(png):
    return int.from_bytes(png[16:20], "big")


def test_histories_may_lie_elsewhere(home):
    make_histories(((3, 3),), n_episodes=4).save(home / "mine.npz")
    found = analysed("--histories", "mine.npz", "--num-samples", "2")
    assert {(s["goal_row"], s["goal_col"]) for s in found["samples"]} == {(3, 3)}
    assert found["meta"]["histories"] == "mine.npz"


# Errors


def rewrite(path, **changed):
    content = torch.load(path, weights_only=True)
    content["config"] |= changed
    save_checkpoint(path, content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_histories():
    """A whole file of histories that holds none."""
    full = make_histories(n_episodes=6)
    arrays = {k: v[:0] for k, v in vars(full).items() if k != "horizon"}
    return replace(full, **arrays)


CHECKPOINT = Path("checkpoints/tiny/ckpt-30.pt")
HISTORIES = Path("checkpoints/tiny/histories-test.npz")
MISTAKES = {
    "no checkpoint": (CHECKPOINT.unlink, [], "python train.py"),
    "no folder of checkpoints": (None, ["--checkpoint", "nowhere"], "python train.py"),
    "not a checkpoint": (
        lambda: CHECKPOINT.write_text("weights"), [], "cannot be read as a checkpoint"
    ),
    "another kind of dict": (
        lambda: save_checkpoint(CHECKPOINT, {"a": 1}), [], "not a checkpoint of an AD model"
    ),
    "truncated checkpoint": (lambda: truncate(CHECKPOINT), [], "truncated"),
    "tensors that do not fit": (
        lambda: rewrite(CHECKPOINT, n_transit=14),
        [],
        "expected pos_embedding of shape (1, 14, 16), got (1, 12, 16)",
    ),
    "histories too short": (
        lambda: make_histories(n_episodes=2).save(HISTORIES), [], "too short for the context"
    ),
    "no histories": (HISTORIES.unlink, [], "--histories"),
    "histories that are not there": (None, ["--histories", "no.npz"], "no.npz"),
    "damaged histories": (lambda: truncate(HISTORIES), [], "not a whole file"),
    "histories of another kind": (
        lambda: np.savez(HISTORIES, x=np.arange(3)), [], "not a whole file"
    ),
    "histories of a larger room": (
        lambda: make_histories(((6, 6),), n_episodes=6, grid_size=13).save(HISTORIES),
        [],
        "does not fit the checkpoint",
    ),
    "no history in the file": (
        lambda: no_histories().save(HISTORIES),
        [],
        str(HISTORIES),
    ),
    "unknown layer": (None, ["--layers", "0", "2"], "unknown layer 2: expected --layers in 0..1"),
    "negative layer": (None, ["--layers", "-1"], "unknown layer -1"),
    "unknown goal": (None, ["--goal", "4,4"], "expected one of 0,1, 2,2, 4,3"),
    "unknown history": (None, ["--history", "9"], "0..3, got 9"),
    "empty filter": (None, ["--goal", "0,1", "--history", "3"], "no decision passes the filter"),
    "steps before a full context": (None, ["--steps", "0:3"], "between 11"),
    "too long a stride": (None, ["--stride", "40"], "stride 40"),
    "a file as output": (lambda: Path("file").write_text(""), ["--out", "file"], "--out"),
    "output below a file": (lambda: Path("file").write_text(""), ["--out", "file/a"], "--out"),
    "a device that is not there": (None, ["--device", "cuda:99"], "'cuda:99', which is not there"),
    "no such device": (None, ["--device", "abacus"], "'abacus'"),
}  # fmt: skip


def earlier_result(home):
    """An output folder as an earlier run left it."""
    (home / "out" / "layer_0").mkdir(parents=True)
    for name in pictures([0], [0]):
        (home / "out" / name).write_text(name)
    return files_of(home / "out")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_earlier_results(home, capsys, name):
    prepare, argv, message = MISTAKES[name]
    before = earlier_result(home)
    if prepare is not None:
        prepare()
    assert message in refused(main, ["--out", "out", *argv], capsys)
    assert files_of(home / "out") == before


@pytest.mark.parametrize(
    "argv",
    [
        "--num-samples 0", "--num-samples -3", "--num-samples many", "--num-figures -1",
        "--stride 0", "--seed -1", "--dpi 0", "--steps 7", "--steps 1:2:3", "--goal 3",
        "--goal a,b", "--layers first", "--no-such-flag",
    ],
)  # fmt: skip
def test_a_flag_without_sense_is_an_error_that_names_it(home, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert "error: " in err.splitlines()[-1]
    assert argv.split()[0] in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "form"),
    [("--steps 7", "FIRST:LAST"), ("--goal 3", "ROW,COL"), ("--goal x,1", "ROW,COL")],
)
def test_a_value_of_the_wrong_form_is_told_the_right_one(capsys, argv, form):
    with pytest.raises(SystemExit):
        main(argv.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"expected {form}, for example " in line
    assert f"got {argv.split()[1]!r}" in line


def test_a_failure_before_the_first_picture_leaves_earlier_results(home, monkeypatch):
    before = earlier_result(home)

    def broken(*_, **__):
        raise RuntimeError("broken layer")

    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        main(["--out", "out"])
    assert files_of(home / "out") == before


@pytest.mark.parametrize("name", ["layer_0", "metrics.json/x", "layer_0/attention_x.png/x"])
def test_what_stands_in_the_way_of_a_file_is_one_line(home, capsys, name):
    path = home / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("in the way")
    line = refused(main, ["--num-samples", "1", "--out", "out"], capsys)
    assert "cannot write to the output folder out" in line
    assert path.read_text() == "in the way"


def command(*argv, cwd):
    return subprocess.run(
        [sys.executable, Path(module.__file__), *argv],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_the_real_command_without_a_checkpoint_says_to_train(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: No checkpoint found")
    assert "python train.py" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_real_command_works_wherever_it_is_called(shown, tmp_path):
    checkpoints = shown.folder / "checkpoints"
    done = command("--num-samples=1", "--layers=1", "--dpi=20", "--checkpoint", checkpoints,
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "💡 INSIGHT: " in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert set(files_of(tmp_path / "figs" / "attention")) == pictures([0], [1])
