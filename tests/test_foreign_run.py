"""The commands on a run and histories of other Dark Room code, as a user of it runs them."""

import json

import pytest
from foreign import held_out, make_foreign_run

import compare_compression
import visualize_attention


@pytest.fixture
def given_run(tmp_path, tiny_model, monkeypatch):
    """`--checkpoint RUN` of a tiny model in a room of 5 x 5, and its HDF5 file."""
    run, file = make_foreign_run(
        tmp_path, tiny_model.state_dict(), 2, grid_size=5, horizon=5, n_steps=40
    )
    monkeypatch.chdir(tmp_path)
    return ["--checkpoint", str(run.relative_to(tmp_path))], str(file.relative_to(tmp_path))


def test_the_main_job(given_run, tmp_path, capsys):
    checkpoint, file = given_run
    argv = [*checkpoint, "--histories", file, "--num-samples", "3", "--num-figures", "0"]
    visualize_attention.main([*argv, "--layers", "1", "--dpi", "40"])
    found = json.loads((tmp_path / "figs/attention/metrics.json").read_text())
    goals = {(sample["goal_row"], sample["goal_col"]) for sample in found["samples"]}
    assert goals == {divmod(cell, 5) for cell in held_out(0, 0.9, 25)}
    assert (tmp_path / "figs/attention/layer_1/attention_summary_layer1.png").is_file()
    assert "6 histories of 40 steps, 3 goals" in " ".join(capsys.readouterr().out.split())


def test_the_comparison(given_run, tmp_path):
    checkpoint, _ = given_run
    argv = ["--strategies", "recent", "--budgets", "4", "--seeds", "2", "--episodes", "4"]
    compare_compression.main([*checkpoint, *argv])
    found = json.dumps(json.loads((tmp_path / "figs/compression/results.json").read_text()))
    assert all(f"({cell // 5}, {cell % 5})" in found for cell in held_out(0, 0.9, 25))
