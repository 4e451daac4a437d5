"""The example adapters, run as a user runs them; one is for checkpoints of jaehyeon-son/dicp."""

import functools
import json
import re
import sys

import numpy as np
import pytest
import torch
from adapters import ADAPTERS, CPU, EXAMPLES, analysed, check_metrics
from conftest import refused
from hostile import refusal

import compare_compression
import visualize_attention
from historylens.adapter.agent import load

SIZES = {  # layers and heads
    "sar_mha": (2, 4), "gpt2_query_first": (3, 4), "rotary_sdpa": (3, 6),
    "explicit_softmax": (2, 2), "previous_action": (2, 4),
}  # fmt: skip


@pytest.fixture(params=sorted(SIZES | ADAPTERS))
def example(request):
    if request.param == "gpt2_query_first":
        pytest.importorskip("transformers")
    return request.param


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp(name) / "out"
        return *analysed(ADAPTERS[name], out), out

    return run


def test_the_main_job_runs_on_it(example, jobs):
    content, rows, out = jobs(example)
    n_layers, n_heads = SIZES[example]
    assert [len(x["head_means"]["entropy"]) for x in content["layers"]] == [n_heads] * n_layers
    assert [bool(sample["title"]) for sample in content["samples"]] == [True] * 3
    assert len(rows) == 3 * n_layers * (n_heads + 1)
    for row in rows:  # attention on transitions and on the rest adds up
        mass = float(row["mean_context_attention"]) * int(row["n_context"])
        assert mass + float(row["mass_self"]) == pytest.approx(1, abs=1e-5)
    drawn = {path.name for path in (out / "layer_0").iterdir()}
    assert drawn == {f"attention_{kind}_sample0_layer0.png" for kind in ("heatmap", "lines")}


@pytest.mark.parametrize(("name", "size", "on_transitions"), [
    ("sar_mha", 91, lambda rows: rows[..., :90].reshape(3, 4, 30, 3).sum(-1)),
    ("previous_action", 63, lambda x: x[..., 2:60:3] + x[..., 3::3] + x[..., 4::3]),
])  # fmt: skip
def test_metrics_are_those_of_transitions_whatever_tokens_they_are_cut_into(
    jobs, name, size, on_transitions
):
    content, *_ = jobs(name)
    check_metrics(content, load(ADAPTERS[name], 3, 0, CPU), on_transitions)
    assert content["uniform"]["mean_context_attention"] == pytest.approx(3 / size)


def test_samples_of_several_lengths_are_measured_in_the_row_of_the_token_that_decides(jobs):
    content, *_ = jobs("explicit_softmax")
    agent = load(ADAPTERS["explicit_softmax"], 3, 0, CPU)
    for i, n in enumerate((8, 16, 24)):  # behind the query, padding is not counted
        rows = lambda x, n=n: x[..., 1 : n + 1]  # noqa: E731
        check_metrics(content, agent, rows, [i])
    uniform = sum(1 / (n + 1) for n in (8, 16, 24)) / 3
    assert content["uniform"]["mean_context_attention"] == pytest.approx(uniform)


def test_files_hold_labels_and_what_each_token_is_and_the_same_seed_gives_the_same(jobs, tmp_path):
    content, rows, out = jobs("sar_mha")
    analysed(ADAPTERS["sar_mha"], tmp_path, drawn=None)
    assert (tmp_path / "metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()
    assert [*rows[0]][:5] == ["sample", "goal", "layer", "head", "n_context"]
    assert {row["goal"] for row in rows} == {"left end", "right end"}
    tokens, drawn = content["samples"][0]["tokens"], content["drawn"]["layers"]["0"]["0"]
    assert tokens["part"][:4] == ["state", "action", "reward", "state"]
    assert tokens["decides"] == 90
    assert len(drawn["query_rows"]["heads"][0]) == 91
    np.testing.assert_allclose(drawn["uniform_query_row"], 1 / 91, rtol=1e-5)
    assert drawn["uniform_received"][-1] == pytest.approx(1 / 91, rel=1e-5)


def test_heads_chooses_heads_keeps_their_numbers_and_says_so(jobs, tmp_path, capsys):
    every, *_ = jobs("sar_mha")
    chosen = "--heads", "3", "1", "--layers=1"
    some, rows = analysed(ADAPTERS["sar_mha"], tmp_path, *chosen, drawn=None)
    assert [row["head"] for row in rows[:3]] == ["1", "3", "mean"]
    said = r"^Heads: +1, 3: metrics, insights and pictures are of these alone$"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)
    both = [every["layers"][1]["head_means"]["entropy"][head] for head in (1, 3)]
    assert some["layers"][0]["head_means"]["entropy"] == both
    assert len(some["drawn"]["layers"]["1"]["0"]["query_rows"]["heads"]) == 2


def test_many_heads_are_drawn_on_several_pages(tmp_path):
    text = ADAPTERS["sar_mha"].read_text().replace("N_HEADS = 9, 32, 4", "N_HEADS = 9, 34, 34")
    (tmp_path / "mine.py").write_text(text)
    analysed(tmp_path / "mine.py", tmp_path / "out", "--layers", "0", drawn=None)
    names = {path.stem for path in tmp_path.glob("out/layer_0/attention_heatmap*")}
    assert names == {f"attention_heatmap_sample0_layer0{x}" for x in ("", "_page2", "_page3")}


def test_it_is_taken_without_a_word_and_acts_on_shorter_history(example, capsys):
    agent = load(ADAPTERS[example], 3, 0, CPU)
    assert (agent.unseen, agent.sees_all, capsys.readouterr().err) == ({}, True, "")
    whole = agent.act(history := agent.history([0]))
    fewer = agent.act(history.take(torch.tensor([[0, 2, history.n - 1]])))
    assert fewer.shape == whole.shape
    assert not torch.equal(fewer, whole)
    torch.testing.assert_close(agent.forward(history), whole)


def test_a_comparison_runs_in_its_environment(tmp_path, monkeypatch, undrawn):
    pytest.importorskip("gymnasium")
    monkeypatch.delitem(sys.modules, "corridor", raising=False)  # of another test's folder
    flags = ["--seeds=2", "--episodes=2", "--strategies", "recent", "top-k", "--budgets=5"]
    flags += ["--device=cpu", f"--adapter={ADAPTERS['sar_mha']}", f"--out={tmp_path}"]
    compare_compression.main(flags)
    found = json.loads((tmp_path / "results.json").read_text())["fingerprint"]
    assert (found["goals"], found["n_max"]) == (["left end", "right end"], 30)


@pytest.mark.parametrize(("main", "name", "argv", "words"), [
    (visualize_attention.main, "sar_mha", ["--goal", "0,1"], "--goal has no meaning beside --ad"),
    (visualize_attention.main, "sar_mha", ["--checkpoint", "x"], "--checkpoint has no meaning"),
    (visualize_attention.main, "sar_mha", ["--heads", "4"], "head 4: expected --heads in 0..3"),
    (compare_compression.main, "rotary_sdpa", [], "no make_env()"),
])  # fmt: skip
def test_a_flag_without_sense_is_one_line(tmp_path, capsys, main, name, argv, words):
    assert words in refused(main, ["--adapter", ADAPTERS[name], "--out", tmp_path, *argv], capsys)


CONFIG = {
    "env": "darkroom", "horizon": 5, "dim_states": 2, "num_actions": 5,
    "n_transit": 9, "tf_n_layer": 2, "tf_n_head": 2, "tf_n_embd": 8, "tf_n_inner": 16,
    "tf_dropout": 0.1, "train_source_timesteps": 20, "device": torch.device("cuda:0"),
}  # fmt: skip
ROOM = {"grid_size": 4}  # of grid worlds alone
LLAMA = "transformer.blocks.0.attn.attn.weight"
KNOWN = "got {} on a small Llama of jaehyeon-son/dicp: the adapter examples/dicp.py {}"


@pytest.mark.parametrize(("names", "config", "said"), [
    ([LLAMA], ROOM | {"model": "AD"}, KNOWN.format("AD", "reads it")),
    ([f"module.{LLAMA}", "module.transformer.blocks.11.norm_1.weight"],
     ROOM | {"model": "DPT", "env": "darkkeytodoor"}, KNOWN.format("DPT", "reads it")),
    ([f"_orig_mod.{part}.{LLAMA}" for part in ("reviewing_decisions", "decisions_to_go")],
     ROOM | {"model": "IDT"}, KNOWN.format("IDT", "(AD and DPT in grid worlds) is a pattern")),
    ([LLAMA], {"model": "AD"}, KNOWN.format("AD", "(AD and DPT in grid worlds) is a pattern")),
    ([LLAMA], ROOM, "do not fit"),  # another code's blocks, of which nothing is known
    ([LLAMA], ROOM | {"model": "GPT"}, "do not fit"),
    (["my_transformer.blocks.0.weight"], ROOM | {"model": "AD"}, "do not fit"),
])  # fmt: skip
def test_a_checkpoint_of_dicp_and_no_other_is_named_with_the_example_that_reads_it(
    tmp_path, names, config, said
):
    path, weights = tmp_path / "ckpt-7.pt", dict.fromkeys(names, torch.ones(2))
    torch.save({"step": 7, "config": CONFIG | config, "model": weights}, path)
    found = refusal(path)
    assert said in found
    assert ("jaehyeon-son" in found) == ("jaehyeon-son" in said)


CHECKOUT = {  # made up: what the example asks of a checkout, and no more
    "model": """
import torch
from torch import nn

class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rope_cache_fp32 = self.build_rope_cache("meta", torch.float32)  # elsewhere

    def build_rope_cache(self, device, dtype):
        return torch.ones(27, 2, dtype=dtype, device=device)

    def forward(self, x, max_seq_length, dtype):
        assert (max_seq_length, dtype) == (9, "fp32") and x.shape[1] <= 9
        assert self.rope_cache_fp32.device == x.device
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attend(x, x, x, attn_mask=mask, need_weights=False)[0]

class AD(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer, self.embed_context = Llama(), nn.Linear(10, 8)
        self.embed_query_state, self.pred_action = nn.Embedding(16, 8), nn.Linear(8, 5)

class DPT(AD):
    def __init__(self, config):
        super().__init__(config)
        self.pred_actions = nn.Linear(8, 5)
        del self.pred_action, self.embed_query_state

MODEL = {"AD": AD, "DPT": DPT}
torch.manual_seed(0)
""",
    "dataset": """
import numpy as np

class ADDataset:
    def __init__(self, config, folder, mode, n_stream, n_steps):
        assert (folder, mode, n_stream, n_steps) == ("here", "test", 1, 20)
        self.states = np.random.default_rng(0).integers(4, size=(2, 20, 2))

    def __len__(self):
        return 2 * 12

    def __getitem__(self, i):
        at, states = i % 12, self.states[i // 12]
        return {"states": states[at : at + 8], "next_states": states[at + 1 : at + 9],
            "actions": np.arange(8) % 5, "rewards": np.arange(8) % 2,
            "query_states": states[at + 8]}
""",
}


@pytest.mark.parametrize("kind", ["AD", "DPT"])
def test_the_example_reads_a_checkout_and_its_checkpoint(tmp_path, monkeypatch, capsys, kind):
    for name in ("rotary_emb", "dropout_layer_norm", "xformers.ops", *CHECKOUT):
        monkeypatch.setitem(sys.modules, name, None)  # so that ours come back
    for name, text in CHECKOUT.items():
        (tmp_path / f"{name}.py").write_text(text)
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    path, config = tmp_path / "ckpt-7.pt", CONFIG | ROOM | {"model": kind, "traj_dir": "here"}
    weights = __import__("model").MODEL[kind](config).state_dict()
    torch.save({"step": 7, "config": config, "model": weights}, path)
    monkeypatch.setenv("DICP", str(tmp_path))
    monkeypatch.setenv("DICP_CHECKPOINT", str(path))
    found, _ = analysed(EXAMPLES / "dicp.py", tmp_path / "out")
    assert f"{kind}: 1 layer x 2 heads" in capsys.readouterr().out
    tokens = found["samples"][0].get("tokens")  # None: one a transition, then the query
    assert tokens is None if kind == "AD" else tokens["part"][0] == "query"
    assert tokens is None or tokens["decides"] == 8
    assert found["samples"][0]["title"].startswith("held-out task ")
