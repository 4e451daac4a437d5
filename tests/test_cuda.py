"""On a GPU, where there is one: the numbers of the CPU, from capture to the commands."""

import contextlib
import io
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import ad_agent, make_histories, sharp_model, write_checkpoint
from eager import Given
from test_train import flags
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from compare_compression import main as compare
from historylens.agent import act_in_parts, look
from historylens.capture import capture, record_attention
from historylens.compression import METHODS
from train import main as train
from visualize_attention import main as visualize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"atol": 1e-5, "rtol": 1e-4, "equal_nan": True}
GOALS = ((0, 1), (2, 2), (4, 3))


def causal_mask(n_queries, n_keys, device):
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def cached(q, k):
    """Tokens in two passes, the second with the keys of the first."""
    half, n = q.shape[2] // 2, q.shape[2]
    sdpa(q[:, :, :half], k[:, :, :half], k[:, :, :half], is_causal=True)
    sdpa(q[:, :, half:], k, k, attn_mask=causal_mask(n - half, n, q.device))


def eager(q, k):
    """A softmax written out; the same weights are handed in under another name."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    seen = causal_mask(q.shape[2], q.shape[2], q.device)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    record_attention("handed.in", weights.clone())
    return weights @ k


def band(q, k):
    sdpa(q, k, k, causal_mask(q.shape[2], q.shape[2], q.device).triu(-7))


def finite(q, k):
    seen = causal_mask(q.shape[2], q.shape[2], q.device).triu(-7)
    sdpa(q, k, k, torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -1e4))


FUNCTIONS = {
    "causal": lambda q, k: sdpa(q, k, k, is_causal=True), "all": lambda q, k: sdpa(q, k, k),
    "grouped heads": lambda q, k: sdpa(q, k, k, is_causal=True, enable_gqa=True),
    "bool mask": band, "finite mask": finite, "cache": cached, "softmax": eager,
}  # fmt: skip


def compared(ours, theirs, tolerance=CLOSE):
    """All tensors of two records are alike, and lie on the CPU."""
    assert [x.name for x in ours] == [x.name for x in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name, values in vars(one).items():
            if isinstance(values, torch.Tensor):
                assert values.device.type == "cpu"
                torch.testing.assert_close(values, vars(other)[name], **tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_capture_reads_what_it_reads_on_a_cpu(name):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 4, 24, 8).unbind()
    k = k[:, :2] if name == "grouped heads" else k
    query = torch.tensor([23, 20, 23]) if name != "cache" else -1
    found, model = [], Given(FUNCTIONS[name])
    for device in ("cpu", "cuda"):
        with capture(model, maps=[0, 2], map_size=10, query=query) as record:
            model(q.to(device), k.to(device))
        found.append(list(record))
    compared(*found)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_and_mixed_precision(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=padded)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(5, 40, 32), torch.full((40, 40), -torch.inf).triu(1)
    padding = torch.arange(40) >= torch.tensor([40, 31, 40, 22, 5])[:, None] if padded else None
    query, found = (-1 if padding is None else (~padding).sum(1) - 1), []
    for device, mixed in (("cpu", False), ("cuda", False), ("cuda", True)):
        model, given = deepcopy(encoder).to(device), {"mask": mask.to(device)}
        if padded:
            given["src_key_padding_mask"] = padding.to(device)
        autocast = torch.autocast(device, torch.bfloat16, enabled=mixed)
        with autocast, capture(model, maps=[1], query=query, padding=padding) as record:
            model(x.to(device), **given)
        found.append(list(record))
    compared(*found[:2])
    compared(found[0], found[2], {"atol": 0.02, "rtol": 0.05, "equal_nan": True})


def test_every_method_keeps_and_makes_what_it_does_on_a_cpu(tiny_model):
    """With the same random numbers; and the agent acts on it as on a CPU."""
    decisions = [(0, 20, 1), (1, 22, 1), (2, 24, 1)]
    agents = [ad_agent(deepcopy(tiny_model), make_histories(), decisions) for _ in range(2)]
    agents[1].model.to("cuda")
    agents[1].device = torch.device("cuda")
    for name, method in METHODS.items():
        kept, logits = [], []
        for agent in agents:
            history = look(agent, agent.history(range(3)), method.needs)
            shorter = method.compress(history, 4, np.random.default_rng(0))
            kept.append([x.cpu() for x in (*shorter.inputs, shorter.counts)])
            if method.keeps != "none":
                logits.append(act_in_parts(agent, shorter).cpu())
        for one, other in zip(*kept, strict=True):
            torch.testing.assert_close(one, other, msg=name)
        if logits:
            torch.testing.assert_close(*logits, **CLOSE, msg=name)


def test_the_commands_give_the_same_numbers(tmp_path, tiny_config):
    write_checkpoint(tmp_path / "run/ckpt-30.pt", sharp_model(tiny_config), [*map(list, GOALS)], 30)
    make_histories(GOALS, n_episodes=12).save(tmp_path / "run/histories-test.npz")

    def run(main, name, *flags):
        out = tmp_path / name
        argv = ["--checkpoint", tmp_path / "run", "--out", out, *flags]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            main([*map(str, argv)])
        return said.getvalue(), out

    content = []
    for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        flags = ["--device", device, "--precision", precision, "--num-figures", 1]
        said, out = run(visualize, device + precision, "--num-samples", 6, *flags)
        assert f"Device: {device}" in " ".join(said.split())
        assert (out / "layer_0/attention_heatmap_sample0_layer0.png").stat().st_size > 1000
        content.append(json.loads((out / "metrics.json").read_text()))
    for other, close in ((content[1], 1e-4), (content[2], 0.1)):
        for ours, theirs in zip(content[0]["layers"], other["layers"], strict=True):
            for name, values in ours["per_sample"].items():
                np.testing.assert_allclose(theirs["per_sample"][name], values, close, close)
    plain, other = (one["effects"]["strategies"]["recent"]["sizes"] for one in content[:2])
    for ours, theirs in zip(plain, other, strict=True):
        np.testing.assert_allclose(theirs["kl_mean"], ours["kl_mean"], 1e-3, 1e-5)
    small = ["--strategies", "recent", "top-k", "--budgets", 3, "--seeds", 1, "--episodes", 2]
    played = []
    for device in ("cpu", "cuda"):
        _, out = run(compare, f"compared-{device}", *small, "--device", device)
        played.append(json.loads((out / "results.json").read_text())["arms"])
    assert played[0].keys() == played[1].keys()


def test_a_training_runs(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    train(flags(tmp_path, device="cuda"))
    assert torch.cuda.max_memory_allocated()
    assert len([*tmp_path.rglob("ckpt-*.pt")]) >= 1
