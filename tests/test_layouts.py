"""Models that read (previous action, previous reward, state): which transition a token is of."""

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from test_examples import ADAPTERS, agent_of, analysed, check_metrics

from historylens.tokens import NONE, QUERY, Tokens
from visualize_attention import main

LAYOUT = ("previous action", "previous reward", "state")
NAMES = [*LAYOUT, "time", "previous transition"]
MERGED = {  # into one token a step
    "torch.stack(parts, dim=2).flatten(1, 2)": "sum(parts)",
    '"previous action", "previous reward", "state"))': '"previous transition",))',
}


@given(
    st.integers(1, 6), st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.integers(0, 3)
)
def test_a_previous_part_is_of_the_transition_before_its_step(n, parts, where):
    parts.insert(where % (len(parts) + 1), "previous reward")  # one of them at least
    expected = []
    for step in range(n + 1):
        for name in parts:
            if name.startswith("previous"):
                expected.append((step - 1 if step > 0 else NONE, name))
            else:
                expected.append((step, name) if step < n else (NONE, QUERY))
    found = Tokens.of(n, parts)
    assert [*zip(found.transition, found.part, strict=True)] == expected
    assert (found.decides, found.n) == (len(found) - 1, n)


def test_a_token_a_step_is_no_plain_map_and_what_decides_is_last_unless_another_is_said_to():
    three, one = Tokens.of(2, LAYOUT), Tokens.of(2, "previous transition")
    assert three.parts == ("state", "previous action", "previous reward")
    assert (one.transition.tolist(), one.decides, one.is_plain) == ([-1, 0, 1], 2, False)
    assert Tokens.of(2, LAYOUT, decides=5).decides == 5
    with pytest.raises(ValueError, match=r"expected query as 'last' beside .*, got 'first'"):
        Tokens.of(2, LAYOUT, query="first")


def test_a_step_may_be_one_token_which_is_of_the_transition_before(tmp_path, capsys):
    """And a map of the step itself is refused, with the name of the right one."""
    path, out = tmp_path / "mine.py", tmp_path / "figs"
    text = ADAPTERS["previous_action"].read_text()
    for old, new in MERGED.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    content, _ = analysed(path, out)
    check_metrics(content, agent_of(path), lambda rows: rows[..., 1:])
    assert len(list(out.glob("layer_0/*.png"))) == 2
    path.write_text(text.replace('parts=("previous transition",)', ""))
    said = refused(main, ["--adapter", path, "--out", out, "--device=cpu"], capsys)
    assert "('previous transition',)" in said
