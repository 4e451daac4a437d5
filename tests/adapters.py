"""Adapters as users have them: the examples, changed or as they are, loaded and analysed."""

import csv
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import draw_quickly

import visualize_attention
from historylens.adapter.agent import load
from historylens.capture import capture
from historylens.pictures.painter import Painter

EXAMPLES, DRAW = Path(__file__).resolve().parents[1] / "examples", Painter.draw
OTHERS = ("corridor", "flash_attn", "dicp")  # no adapters, or one of code that is not here
ADAPTERS = {p.stem: p for p in EXAMPLES.glob("*.py") if p.stem not in OTHERS}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder to write adapters in, and an environment anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "corridor", raising=False)


def written(*changes, name="sar_mha"):
    """Write an example as `mine.py`, and the environment beside it.

    A change is a pair, a text and another for it, or a text that is added to the example.
    """
    texts = [(EXAMPLES / f"{stem}.py").read_text() for stem in (name, "corridor")]
    for change in changes:
        if isinstance(change, str):
            texts[0] += f"\n{change}\n"
            continue
        assert any(change[0] in text for text in texts), change
        texts = [text.replace(*change) for text in texts]
    for file, text in zip(("mine.py", "corridor.py"), texts, strict=True):
        Path(file).write_text(text)
    return "mine.py"


def agent_of(*changes, name="sar_mha", n=4):
    return load(written(*changes, name=name), n, 0, CPU)


def analysed(path, out, *argv, drawn="layer_0"):
    """Run the main job on three samples: `metrics.json` and `metrics.csv`.

    The pictures of one lie where they belong; only those in the folder `drawn` are real, and what
    compares samples is not drawn: that is the same for all models.
    """
    flags = ["--num-samples", "3", "--num-figures", "1", "--num-effects", "0", "--dpi", "20"]
    argv = [*flags, "--device", "cpu", "--adapter", str(path), "--out", str(out), *argv]

    def draw(painter, function, path, *args, **kwargs):
        real = path.parent.name == drawn
        DRAW(painter, function if real else draw_quickly, path, *args, **kwargs)

    with (
        mock.patch("historylens.pictures.draw_summaries"),
        mock.patch.object(Painter, "draw", draw),
    ):
        visualize_attention.main(argv)
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    return json.loads((out / "metrics.json").read_text()), rows


def check_metrics(content, agent, on_transitions, samples=(0, 1, 2)):
    """Metrics of samples are of rows `on_transitions`, as the model's own rows give them."""
    history = agent.history(samples)
    decides = agent.tokens(history)[0].decides
    with torch.inference_mode(), capture(agent.model, query=decides) as record:
        agent.act(history)
    for layer, found in zip(record, content["layers"], strict=True):
        whole = on_transitions(layer.query_rows.double()).mean(1)  # (S, n)
        k = whole.shape[1] // 4
        expected = {
            "mean_context_attention": whole.mean(-1),
            "mass_self": 1 - whole.sum(-1),
            "mass_rewarded": (whole * history.rewarded).sum(-1),
            "recent_distant_ratio": whole[:, -k:].mean(-1) / whole[:, :k].mean(-1),
        }
        for name, values in expected.items():
            own = [found["per_sample"][name][i] for i in samples]
            np.testing.assert_allclose(own, values, rtol=1e-5)
