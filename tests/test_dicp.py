"""Checkpoints of jaehyeon-son/dicp on its small Llama are named, and its example reads them."""

import sys
from pathlib import Path

import pytest
import torch
from hostile import refusal
from test_examples import analysed

ROOT = Path(__file__).parents[1]
CONFIG = {
    "env": "darkroom", "grid_size": 4, "horizon": 5, "dim_states": 2, "num_actions": 5,
    "n_transit": 9, "tf_n_layer": 2, "tf_n_head": 2, "tf_n_embd": 8, "tf_n_inner": 16,
    "tf_dropout": 0.1, "train_source_timesteps": 20, "device": torch.device("cuda:0"),
}  # fmt: skip
IDT = ("reviewing_decisions", "h_decision_transformer", "decisions_to_go")


def llama(prefix=""):
    """Some of its tensors, by its names."""
    names = ("blocks.0.attn.attn.weight", "blocks.11.norm_1.weight")
    return {f"{prefix}transformer.{name}": torch.ones(2) for name in names}


def message(tmp_path, weights, **config):
    path = tmp_path / "ckpt-7.pt"
    torch.save({"step": 7, "config": CONFIG | config, "model": weights}, path)
    return refusal(path)


@pytest.mark.parametrize(("kind", "env", "wrapper", "is_read"), [
    ("AD", "darkroom", "", True), ("DPT", "darkkeytodoor", "module.", True),
    ("IDT", "darkroom", "_orig_mod.", False), ("AD", "metaworld", "", False),
])  # fmt: skip
def test_it_is_named_with_the_example_that_reads_it(
    tmp_path, monkeypatch, kind, env, wrapper, is_read
):
    weights = {}
    for part in IDT if kind == "IDT" else ("",):
        weights |= llama(wrapper + (part and f"{part}."))
    if env == "metaworld":
        monkeypatch.delitem(CONFIG, "grid_size")
    said = message(tmp_path, weights, model=kind, env=env)
    assert f"got {kind} on a small Llama of jaehyeon-son/dicp: the adapter examples/dicp.py" in said
    assert ("examples/dicp.py reads it" in said) == is_read
    assert ("is a pattern" in said) != is_read
    assert (ROOT / "examples" / "dicp.py").is_file()


@pytest.mark.parametrize(("weights", "config"), [
    (llama(), {}),  # another code's blocks, of which nothing is known
    (llama(), {"model": "GPT"}),
    ({"my_transformer.blocks.0.weight": torch.ones(2)}, {"model": "AD"}),
])  # fmt: skip
def test_other_tensors_that_do_not_fit_are_not_called_so(tmp_path, weights, config):
    said = message(tmp_path, weights, **config)
    assert "dicp" not in said
    assert "do not fit" in said


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

class DPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer, self.embed_context = Llama(), nn.Linear(10, 8)
        self.pred_actions = nn.Linear(8, 5)

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
    path, config = tmp_path / "ckpt-7.pt", CONFIG | {"model": kind, "traj_dir": "here"}
    weights = __import__("model").MODEL[kind](config).state_dict()
    torch.save({"step": 7, "config": config, "model": weights}, path)
    monkeypatch.setenv("DICP", str(tmp_path))
    monkeypatch.setenv("DICP_CHECKPOINT", str(path))
    found, _ = analysed(ROOT / "examples" / "dicp.py", tmp_path / "out")
    assert f"{kind}: 1 layer x 2 heads" in capsys.readouterr().out
    tokens = found["samples"][0].get("tokens")  # None: one a transition, then the query
    assert tokens is None if kind == "AD" else tokens["part"][0] == "query"
    assert tokens is None or tokens["decides"] == 8
    assert found["samples"][0]["title"].startswith("held-out task ")
