"""The example adapters, run as a user runs them: the main job and a comparison."""

import csv
import functools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused

import compare_compression
import visualize_attention
from historylens.adapter.agent import load
from historylens.capture import capture

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {p.stem: p for p in (ROOT / "examples").glob("*.py") if p.stem != "corridor"}
NEEDS = {"gpt2_query_first": "transformers"}
LAYERS = {"sar_mha": 2, "gpt2_query_first": 3, "rotary_sdpa": 3, "explicit_softmax": 2}
HEADS = {"sar_mha": 4, "gpt2_query_first": 4, "rotary_sdpa": 6, "explicit_softmax": 2}


@pytest.fixture(params=sorted(LAYERS | ADAPTERS))
def example(request):
    needed = NEEDS.get(request.param)
    if needed and find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    return request.param


def analysed(name, out, *argv):
    """Run the main job on three samples, one of them drawn: `metrics.json` and `metrics.csv`."""
    flags = ["--num-samples", "3", "--num-figures", "1", "--num-effects", "0", "--dpi", "20"]
    path = str(ADAPTERS.get(name, name))
    visualize_attention.main(["--adapter", path, *flags, "--out", str(out), *argv])
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    return json.loads((out / "metrics.json").read_text()), rows


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What the main job writes for an example, and where: each is run once."""

    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp(name) / "out"
        return *analysed(name, out), out

    return run


def agent_of(name, n=3):
    return load(ADAPTERS[name], n, 0, torch.device("cpu"))


def test_the_main_job_runs_on_it(example, jobs):
    content, rows, out = jobs(example)
    assert len(content["layers"]) == LAYERS[example]
    assert {len(x["head_means"]["entropy"]) for x in content["layers"]} == {HEADS[example]}
    assert len(content["samples"]) == 3
    assert all(sample["title"] for sample in content["samples"])
    assert len(rows) == 3 * LAYERS[example] * (HEADS[example] + 1)
    drawn = {path.name for path in (out / "layer_0").iterdir()}
    assert {f"attention_{kind}_sample0_layer0.png" for kind in ("heatmap", "lines")} < drawn
    assert not [name for name in drawn if "page" in name]


def test_attention_on_transitions_and_on_the_rest_adds_up(example, jobs):
    for row in jobs(example)[1]:
        mass = float(row["mean_context_attention"]) * int(row["n_context"])
        assert mass + float(row["mass_self"]) == pytest.approx(1, abs=1e-5)


def test_metrics_are_those_of_transitions_whatever_tokens_they_are_cut_into(jobs):
    content, *_ = jobs("sar_mha")
    agent = agent_of("sar_mha")
    with torch.inference_mode(), capture(agent.model) as record:
        agent.act(agent.history([0, 1, 2]))
    for layer, found in zip(record, content["layers"], strict=True):
        rows = layer.query_rows.double().numpy()  # (3, H, 91)
        whole = rows[..., :90].reshape(3, 4, 30, 3).sum(-1).mean(1)
        ratio = whole[:, -7:].mean(-1) / whole[:, :7].mean(-1)
        each = found["per_sample"]
        np.testing.assert_allclose(each["mean_context_attention"], whole.mean(-1), rtol=1e-5)
        np.testing.assert_allclose(each["recent_distant_ratio"], ratio, rtol=1e-5)
    assert content["uniform"]["mean_context_attention"] == pytest.approx(3 / 91)


def test_samples_of_several_lengths_are_measured_in_the_row_of_the_token_that_decides(jobs):
    content, *_ = jobs("explicit_softmax")
    agent = agent_of("explicit_softmax")
    weights = []
    for attention in agent.model.attentions:
        attention.softmax.register_forward_hook(lambda *call: weights.append(call[-1]))
    for i, n in enumerate((8, 16, 24)):
        weights.clear()
        agent.act(agent.history([i]))
        for layer, found in zip(weights, content["layers"], strict=True):
            row = layer[0].mean(0)[0]  # the query stands first
            each = found["per_sample"]
            mean = pytest.approx(row[1 : n + 1].mean().item())
            assert each["mean_context_attention"][i] == mean
            assert each["mass_self"][i] == pytest.approx(row[0].item())
    uniform = sum(1 / (n + 1) for n in (8, 16, 24)) / 3  # padding is not counted
    assert content["uniform"]["mean_context_attention"] == pytest.approx(uniform)


def test_labels_of_samples_are_columns_of_the_table(jobs):
    rows = jobs("sar_mha")[1]
    assert [*rows[0]][:5] == ["sample", "goal", "layer", "head", "n_context"]
    assert {row["goal"] for row in rows} == {"left end", "right end"}


def test_numbers_of_the_pictures_say_what_each_token_is(jobs):
    content, *_ = jobs("sar_mha")
    assert content["samples"][0]["tokens"]["part"][:4] == ["state", "action", "reward", "state"]
    assert content["samples"][0]["tokens"]["decides"] == 90
    drawn = content["drawn"]["layers"]["0"]["0"]
    assert len(drawn["query_rows"]["heads"][0]) == 91
    np.testing.assert_allclose(drawn["uniform_query_row"], 1 / 91, rtol=1e-5)
    assert drawn["uniform_received"][-1] == pytest.approx(1 / 91, rel=1e-5)


def test_the_same_seed_gives_the_same_files(jobs, tmp_path):
    analysed("sar_mha", tmp_path)
    same = (jobs("sar_mha")[2] / "metrics.csv").read_bytes()
    assert (tmp_path / "metrics.csv").read_bytes() == same


def test_heads_chooses_heads_and_keeps_their_numbers(jobs, tmp_path):
    every, *_ = jobs("sar_mha")
    some, rows = analysed("sar_mha", tmp_path, "--heads", "3", "1", "--layers", "1")
    assert [row["head"] for row in rows[:3]] == ["1", "3", "mean"]
    both = [every["layers"][1]["head_means"]["entropy"][head] for head in (1, 3)]
    assert some["layers"][0]["head_means"]["entropy"] == both
    assert len(some["drawn"]["layers"]["1"]["0"]["query_rows"]["heads"]) == 2


def test_many_heads_are_drawn_on_several_pages(tmp_path):
    text = ADAPTERS["sar_mha"].read_text().replace("N_HEADS = 9, 32, 4", "N_HEADS = 9, 34, 34")
    (tmp_path / "mine.py").write_text(text)
    analysed(tmp_path / "mine.py", tmp_path / "out", "--layers", "0")
    names = {path.name for path in tmp_path.glob("out/layer_0/attention_heatmap*")}
    start = "attention_heatmap_sample0_layer0"
    assert names == {f"{start}.png", f"{start}_page2.png", f"{start}_page3.png"}


def test_the_model_acts_on_shorter_history(example):
    agent = agent_of(example, 1)
    history = agent.history([0])
    whole = agent.act(history)
    kept = torch.tensor([[0, 2, history.n - 1]])
    assert agent.act(history.take(kept)).shape == whole.shape
    assert not torch.equal(agent.act(history.take(kept)), whole)
    torch.testing.assert_close(agent.forward(history), whole)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--goal", "0,1"], "--goal has no meaning beside --adapter"),
        (["--checkpoint", "here"], "--checkpoint has no meaning beside --adapter"),
        (["--heads", "4"], "unknown head 4: expected --heads in 0..3"),
        (["--layers", "2"], "unknown layer 2"),
    ],
)
def test_a_flag_without_sense_is_one_line(tmp_path, capsys, argv, words):
    flags = ["--adapter", ADAPTERS["sar_mha"], "--out", tmp_path]
    assert words in refused(visualize_attention.main, [*flags, *argv], capsys)


def test_a_comparison_runs_in_its_environment(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    monkeypatch.delitem(sys.modules, "corridor", raising=False)  # of another test's folder
    flags = ["--seeds", "2", "--episodes", "2", "--strategies", "recent", "top-k"]
    flags += ["--adapter", str(ADAPTERS["sar_mha"]), "--budgets", "5", "--out", str(tmp_path)]
    compare_compression.main(flags)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["fingerprint"]["goals"] == ["left end", "right end"]
    assert content["fingerprint"]["n_max"] == 30


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("rotary_sdpa", [], "no make_env()"),
        ("sar_mha", ["--checkpoint", "here"], "--checkpoint has no meaning beside --adapter"),
        ("sar_mha", ["--positions", "original"], "--positions has no meaning beside --adapter"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_line(tmp_path, capsys, name, argv, words):
    flags = ["--adapter", ADAPTERS[name], "--out", tmp_path]
    assert words in refused(compare_compression.main, [*flags, *argv], capsys)
