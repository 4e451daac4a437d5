"""Does an adapter describe its model: which token holds what, which decides, what is unseen."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import CPU, analysed, home  # noqa: F401
from eager import CLOSE, weights_of

from historylens.adapter.agent import load
from historylens.agent import Unreadable, attend, look
from historylens.common.errors import UserError
from historylens.effects.guide import rollout

ADAPTER = """
import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention

import historylens
from historylens import Decision, Tokens

N, A, D, H = 7, 3, 12, 2
WAY, LAYOUT, DECIDES, MIX = "sdpa", "one", -1, "none"


def split(x):
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.memory = nn.Parameter(torch.randn(1, 2, D))
        self.past = None

    def forward(self, x):
        q, v = map(split, self.project(x).chunk(2, -1))
        k, n_own = split(x), 0
        if WAY == "memory":
            k, v, n_own = (*(torch.cat([split(self.memory).expand(len(x), -1, -1, -1), y], 2)
                             for y in (k, v)), 2)
        if WAY == "cached":
            past = self.past or [k[:, :, :0], v[:, :, :0]]
            k, v = self.past = [torch.cat(y, 2) for y in zip(past, (k, v))]
        n_new, n_all = q.shape[2], k.shape[2] - n_own
        seen = torch.ones(n_new, n_all).tril(n_all - n_new) > 0
        seen = pad(seen, (n_own, 0), value=True)
        if WAY == "handed in":
            weights = (q @ k.mT).masked_fill(~seen, -1e9).exp()
            historylens.record_attention("mine", weights, seen)
            y = weights / weights.sum(-1, keepdim=True) @ v
        else:
            y = scaled_dot_product_attention(q, k, v, seen)
        return self.out(y.transpose(1, 2).flatten(2))


class Mix(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1) / 9 if MIX == "sum" else x.tanh()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.state, self.act, self.reward = nn.Linear(1, D), nn.Embedding(A + 1, D), nn.Linear(1, D)
        self.attends = nn.ModuleList(Attend() for _ in range(2))
        self.mix, self.head = Mix(), nn.Linear(D, A)

    def embed(self, states, actions, rewards, query):
        states = torch.cat([states, query[:, None]], 1)
        beside = (1, 0) if LAYOUT == "previous" else (0, 1)  # which step has no transition
        actions, rewards = pad(actions, beside, value=A), pad(rewards, beside)
        return self.state(states) + self.act(actions) + self.reward(rewards[..., None])

    def forward(self, *history):
        x = self.embed(*history)
        for attend in self.attends:
            attend.past = None
        chunks = x.split([x.shape[1] - 1, 1], 1) if WAY == "cached" else [x]
        done = []
        for x in chunks:
            for attend in self.attends:
                x = x + attend(x)
            done.append(self.mix(x) + x)
        return self.head(torch.cat(done, 1)[:, DECIDES])


def load():
    return Model()


def samples(n, seed):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield Decision(rng.normal(size=(N, 1)), rng.integers(A, size=N), rng.random(N),
                       rng.normal(size=1))


def act(model, history):
    return model(history.states, history.actions, history.rewards, history.query_states)
"""
TOKENS = """

def tokens(history):
    return Tokens.of(history.n, decides=MAPPED)
"""


def written(way="sdpa", layout="one", decides=-1, mapped=None, mix="none", tokens=TOKENS):
    told = f'"{way}", "{layout}", {decides}, "{mix}"'
    text = ADAPTER.replace('"sdpa", "one", -1, "none"', told)
    Path("mine.py").write_text(text + tokens.replace("MAPPED", repr(mapped)))
    return "mine.py"


def loaded(**options):
    return load(written(**options), 3, 0, CPU)


WAYS = ["sdpa", "handed in", "memory", "cached"]  # others: `tests/test_capture_unseen.py`


@pytest.mark.parametrize("way", WAYS)
def test_a_map_that_fits_is_taken_without_a_word(way, capsys):
    agent = loaded(way=way)
    names = ("mine", "mine #2") if way == "handed in" else ("attends.0", "attends.1")
    assert (agent.layers, agent.unseen, agent.sees_all) == (names, {}, True)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("tokens", [TOKENS, ""])
def test_actions_that_lie_in_the_token_behind_are_told(way, tokens):
    given = "tokens()" if tokens else "no tokens(), so"
    said = re.escape(f"mine.py: {given} has token 3 of transition 3, whose action changes token 4")
    parts = r'parts=\("previous action", "previous reward", "state"\)'
    with pytest.raises(UserError, match=rf"{said} instead; .*, {parts}"):
        loaded(way=way, layout="previous", tokens=tokens)


@pytest.mark.parametrize("wrong", ["parts=('previous transition',)", "query='first'"])
def test_actions_that_lie_in_the_token_before_are_told_with_other_advice(wrong):
    said = (
        r"mine\.py: tokens\(\) has token 4 of transition 3, whose action changes token 3 instead: "
    )
    with pytest.raises(
        UserError, match=rf"{said}Tokens.of\(history.n\) has .*, the query behind\Z"
    ):
        loaded(tokens=TOKENS.replace("decides=MAPPED", wrong))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "handed in"])
@pytest.mark.parametrize(("decides", "mapped"), [(-2, None), (-1, 6), (2, 3)])
def test_a_token_that_does_not_decide_is_told(way, decides, mapped):
    wrong, right = (x % 8 for x in (-1 if mapped is None else mapped, decides))
    said = rf"token {wrong} decide, but what .* gives it .*token {right} does"
    if way == "cached" and right != 7:
        said = ""
    with pytest.raises(UserError, match=rf"mine\.py: tokens\(\) has {said}"):
        loaded(way=way, decides=decides, mapped=mapped)
    assert loaded(way=way, decides=decides, mapped=right).decisions


def test_attention_that_changes_no_logit_does_not_tell_which_token_decides():
    path = Path(written(mapped=3))
    path.write_text(path.read_text().replace("x = x + attend(x)", "x = x + 0 * attend(x)"))
    assert load(path, 3, 0, CPU).decisions


CROSS = """

class Model(Model):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(D, H, 16, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, *history):
        x = self.embed(*history)
        return self.head(self.decoder(x[:, -{n_queries}:], x)[:, -1])


def tokens(history):
    return Tokens.of(history.n)
"""
MEMORY = """

def layers(model):
    return ["*.multihead_attn"]
"""


def test_of_a_decoder_of_the_query_the_layers_that_read_the_history_are_looked_at():
    cross = CROSS.format(n_queries=1)
    said = r"map of the 1 tokens that decoder\.layers\.0\.self_attn .*one of 8 tokens, over which "
    with pytest.raises(UserError, match=said + r"decoder\.layers\.0\.multihead_attn does; layers"):
        loaded(tokens=cross)
    agent, read = loaded(tokens=cross + MEMORY), []
    history = agent.history([0, 1])
    attentions = [layer.multihead_attn for layer in agent.model.decoder.layers]
    for one in attentions:
        one.register_forward_pre_hook(lambda _, args: read.append(args[:2]))
    _, found = attend(agent, history)
    for one, attention, (query, key) in zip(found, attentions, read, strict=True):
        expected = weights_of(attention, query, key)[:, :, -1]
        torch.testing.assert_close(one.query_rows, expected, **CLOSE)
    assert rollout(agent, history) is None
    with pytest.raises(Unreadable, match="where every token attends"):
        look(agent, history, ["received"])


AXES = """
CAPTURE = {"softmax": "attends.*"}


class Attend(Attend):
    def forward(self, x):
        q = x.unflatten(-1, (H, -1))
        weights = torch.einsum("bihd,bjhd->bihj", q, q).softmax(-1)
        return torch.einsum("bihj,bjhd->bihd", weights, q).flatten(2)
"""


@pytest.mark.parametrize(("more", "found"), [
    (CROSS.format(n_queries=3) + MEMORY, r"decoder\..*, where 3 do \(in 2 heads"),
    (AXES, r"attends\.0, where 2 do \(in 8 heads"),
])  # fmt: skip
def test_queries_that_are_neither_all_tokens_nor_one_are_told(more, found):
    said = rf"expected layers where all 8 tokens attend.* got {found}"
    with pytest.raises(UserError, match=said):
        loaded(tokens=more)


HEADS = """
ORDER, CAPTURE = "{}", {{"softmax": "attends.*", "heads": H}}


class Attend(Attend):
    def forward(self, x):
        q = split(x) if ORDER == "B * H" else split(x).transpose(0, 1)
        q = q if ORDER == "H, B" else q.flatten(0, 1)
        y = (q @ q.mT).softmax(-1) @ q
        y = y.unflatten(0, (-1, H)) if ORDER == "B * H" else y.reshape(H, -1, *y.shape[-2:])
        return (y if ORDER == "B * H" else y.transpose(0, 1)).transpose(1, 2).flatten(2)


class Model(Model):
    def forward(self, *history):
        if ORDER != "agents":
            return super().forward(*history)
        return super().forward(*[torch.cat([x, x]) for x in history])[: len(history[0])]
"""


@pytest.mark.parametrize(("order", "said"), [
    ("H * B", r"mine\.py: CAPTURE gives .* of attends\.0 is over \(H \* B, T, T\)"),
    ("H, B", r"mine\.py: act\(\): expected .* of the 3 histories .* B = 2 and H = 3 in attends\.0"),
    ("agents", r"act\(\): expected .* of the 3 histories .* B = 6 and H = 2 in attends\.0"),
])  # fmt: skip
def test_samples_that_are_not_the_first_axis_are_told(order, said):
    assert loaded(tokens=HEADS.format("B * H")).layers == ("attends.0", "attends.1")
    with pytest.raises(UserError, match=said):
        loaded(tokens=HEADS.format(order))


def test_logits_by_chance_are_a_note(capsys):
    dropout = "\nown = act\ndef act(model, history):\n    return own(model, history).mul_({})\n"
    loaded(tokens=dropout.format("1 + 1e-6 * torch.rand(history.size, 1)"))
    assert not capsys.readouterr().err
    loaded(tokens=dropout.format("torch.rand(history.size, 1)"))
    assert "note: act() gives the same history twice other logits" in capsys.readouterr().err


def test_what_cannot_be_tried_is_passed_over():
    path = Path(written())  # there is no other action
    path.write_text(path.read_text().replace("rng.integers(A, size=N)", "np.zeros(N, dtype=int)"))
    assert len(load(path, 3, 0, CPU).layers) == 2


def test_a_module_that_mixes_tokens_unseen_is_a_note_and_a_fact(capsys):
    agent = loaded(mix="sum")
    assert not agent.sees_all
    assert agent.facts["Model"].endswith("beside them unseen: mix")
    line = r"note: 2 layers attend in sight; mix \(a Mix\) mixes tokens by no.*record_attention.*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_what_lies_on_memory_counts_as_of_no_transition():
    written(way="memory")
    _, rows = analysed("mine.py", Path("out"), "--heads=1", drawn=None)
    for row in rows:
        mass = float(row["mean_context_attention"]) * int(row["n_context"])
        assert mass + float(row["mass_self"]) == pytest.approx(1, abs=1e-5)
    agent = load("mine.py", 3, 0, CPU)
    _, (layer, _) = attend(agent, agent.history([0]))
    own, extra = layer.query_rows[0, 1, -1].item(), layer.extra[0, 1].item()
    assert [rows[0][name] for name in ("sample", "layer", "head")] == ["0", "0", "1"]
    assert float(rows[0]["mass_self"]) == pytest.approx(own + extra, abs=1e-5)
    assert extra > 0.01


def test_a_model_that_keeps_its_keys_gives_what_it_gives_in_one_pass():
    drawn = []
    for way in ("sdpa", "cached"):
        written(way=way)
        layers = analysed("mine.py", Path("out"), drawn=None)[0]["drawn"]["layers"]
        drawn.append([layers[i]["0"][kind]["heads"] for i in "01" for kind in layers[i]["0"]])
    np.testing.assert_allclose(*drawn, atol=1e-5)
