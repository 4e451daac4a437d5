"""What the console shows and what the files hold, against the numbers they come from."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from attention_rows import decision, measured, planted, random_rows, uniform

from historylens import report
from historylens.common.files import csv_lines, rounded, write_atomically
from historylens.common.text import cap, labelled
from historylens.insights import find_patterns
from historylens.metrics import NAMES, SUMMARY_METRICS, uniform_received
from historylens.tokens import Tokens

LABELS = ("goal_row", "goal_col", "step")
PLACE = ["sample", *LABELS, "layer", "head", "n_context"]


def some_decisions(n=100):
    labels = [{"goal_row": 2, "goal_col": i, "step": 100 * i} for i in range(3)]
    parts = np.arange(n) // 20, range(0, n, 3)  # episodes, and what is rewarded
    return [decision(n, *parts, f"goal (2, {i}), step {100 * i}", labels[i]) for i in range(3)]


def some_metrics(n=100, slope=0.05):
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, 3, 2, n + 1, sharpness=2, slope=slope) for _ in range(4)]  # layers
    return measured(*rows, numbers=[0, 1, 2, 5], decisions=some_decisions(n))


def of_samples(*rows):
    return measured(np.stack(rows)[:, None])  # one layer of one head


def blocks_of(metrics):
    return report.insight_blocks(find_patterns(metrics), metrics)


def test_overall_block_has_its_form_and_layer_table_an_aligned_line_a_layer_and_uniform_last():
    metrics = some_metrics()
    head, rule, *figures, ratio = report.overall_block(metrics).splitlines()
    assert (head, rule) == ("OVERALL ATTENTION STATISTICS", "=" * 36)
    labels = ("Mean context attention", "Attention concentration (std)", "Attention entropy")
    for line, label, name in zip(figures, labels, NAMES[:3], strict=True):
        summary = metrics.summaries()[name]
        assert line == f"{label}: {summary['mean']:.4f} ± {summary['std']:.4f}"
    assert re.match(r"Recent/Distant ratio: (\d+\.\d\d|> 1000) ± (\d+\.\d\d|> 1000)", ratio)
    lines = report.layer_table(metrics).splitlines()
    assert "n = 100 context tokens, 3 samples)" in lines[0]
    table = lines[1:7]
    assert [line.split()[0] for line in table] == ["layer", "0", "1", "2", "5", "uniform"]
    entropy = metrics.summaries(2)["entropy"]
    ratio = metrics.summaries(2)["recent_distant_ratio"]
    assert f"{entropy['mean']:.4f} ± {entropy['std']:.4f}" in table[3]
    assert f"{cap(ratio['mean'])} ± {cap(ratio['std'])}" in table[3]
    even = [f"{metrics.uniform_mean()[name]:.4f}" for name in SUMMARY_METRICS[:3]]
    assert table[5].split() == ["uniform", *even, "1.00", "100.0", "1.00"]
    end = table[0].index("mean attention") + len("mean attention")
    assert all(line[end : end + 2] == "  " for line in table[:5])
    assert len({line.index("±") for line in table[1:5]}) == 1
    assert "without history" not in lines[-1]
    metrics.n_context[0] = 0
    assert report.layer_table(metrics).endswith("without history all is 0")


def with_ratios(*ratios):
    return [np.array([0.1, 0.0, 0.0, 0.1 * ratio, 0.0]) for ratio in ratios]


@pytest.mark.parametrize(("rows", "text"), [
    ([uniform(20), uniform(20)], "1.00 ± 0.00"),
    (with_ratios(3.0, 3.1, 9.0), "5.03 ± 2.81 (median 3.10)"),
    (with_ratios(1.0, 1.0, 1.2), "1.07 ± 0.09"),  # mean and median part at a tenth
    (with_ratios(1.0, 1.0, 1.6), "1.20 ± 0.28 (median 1.00)"),
    ([planted(20, [19]), uniform(20), uniform(20)], "> 1000 ± > 1000 (median 1.00)"),
    ([planted(20, [19]), planted(20, [18])], "> 1000 ± 0.00"),
])  # fmt: skip
def test_the_ratio_is_capped_and_shows_its_median_where_it_tells_another_story(rows, text):
    block = report.overall_block(of_samples(*rows))
    assert block.endswith(f"Recent/Distant ratio: {text}")
    assert "-0.0" not in block + report.layer_table(of_samples(*rows))


@pytest.mark.parametrize("n", [1, 3, 100, 2000])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_console_output_fits_100_columns(n, slope):
    metrics = some_metrics(n, slope)
    effect = "dropping it changed the action in 3% of decisions; " * 3
    insights = [replace(insight, effect=effect) for insight in find_patterns(metrics)]
    blocks = [report.layer_table(metrics), report.overall_block(metrics)]
    blocks += [report.insight_blocks(insights, metrics), labelled({"Checkpoint": "long/run " * 22})]
    for line in "\n".join(blocks).splitlines():
        assert len(line) + len(re.findall("[💡📊🧪]", line)) <= 100, line  # emoji take two
        assert "nan" not in line.lower().replace("dominant", "")


def test_labelled_lines_are_aligned_and_wrapped_below_their_text_and_large_numbers_capped():
    lines = labelled({"Checkpoint": "a.pt", "Step": "9", "Long": "word " * 40}).splitlines()
    assert lines[:2] == ["Checkpoint: a.pt", "Step:       9"]
    assert lines[3].startswith(" " * 12 + "word")
    assert [cap(x) for x in (3.104, 1000.0, 1000.01)] == ["3.10", "1000.00", "> 1000"]


def test_insight_block_has_headline_advice_and_caveat_and_no_pattern_is_said_and_explained():
    metrics = of_samples(planted(100, [99]))
    first, *others = find_patterns(metrics)
    told = replace(first, effect="Dropped: 2% of actions.")
    text = report.insight_blocks([told, *others], metrics)
    headline, advice = text.splitlines()[:2]
    assert headline == "💡 INSIGHT: Strong recency bias detected!"
    assert advice == "   Consider compressing or removing distant history."
    assert "   🧪 Dropped: 2% of actions." in text
    assert text.count("💡 INSIGHT:") == 3
    words = " ".join(text.split())
    for insight in (first, *others):
        ways = "; ".join(insight.strategies)
        assert f"📊 {insight.evidence} " in words
        assert f" Strategies: {ways}. Example: {insight.example}" in words
    text = blocks_of(of_samples(uniform(8)))
    assert text.startswith("💡 INSIGHT: No single pattern")
    assert "ℹ️  Uniform attention cannot be recognised" in text


EVEN, ONE, ITSELF = uniform(100), planted(100, [50]), planted(100, [0], 0.0)
DOUBTED, CERTAIN = "⚠️  Layer {}: The query keeps", "📊 Layer {}: The mean entropy"


@pytest.mark.parametrize(("fourth", "sixth", "doubt"), [
    (ONE, ONE, ""),
    (ONE, ITSELF, " (in layer 6 by the absolute rule only)"),
    (ITSELF, ONE, " (in layer 4 by the absolute rule only)"),
    (ITSELF, ITSELF, " (by the absolute rule only)"),
])  # fmt: skip
def test_layers_with_the_same_difference_share_one_block(fourth, sixth, doubt):
    text = blocks_of(measured(EVEN, EVEN, EVEN, EVEN, fourth, EVEN, sixth))
    assert "WHERE LAYERS DIFFER FROM THE WHOLE" in text
    headline = f"💡 INSIGHT: Focused attention detected in layers 4 and 6!{doubt}\n"
    assert text.count(headline) == 1
    block = text.partition(headline)[2].partition("💡")[0]
    for layer, rows in ((4, fourth), (6, sixth)):
        said = [words.format(layer) in block for words in (DOUBTED, CERTAIN)]
        assert said == [rows is ITSELF, rows is ONE]
    assert ("Strategies: " in block) == (fourth is ONE or sixth is ONE)


def written(path, **more):
    """metrics.json of three samples, of which 0 and 2 are drawn; the latter has its own tokens."""
    metrics = some_metrics()
    arrays = {"query_rows": {"mean": rounded(uniform(100))}}
    drawn = {layer: {0: arrays, 2: arrays} for layer in (0, 5)}
    tokens = {0: Tokens.of(100), 2: Tokens.of(100, query="first")}
    meta = {"checkpoint": "a.pt", "seed": 0, **more}
    numbers = metrics, some_decisions(), find_patterns(metrics)
    write_atomically(path, report.metrics_json(*numbers, meta, drawn, tokens))
    return metrics, json.loads(path.read_text())


def test_metrics_json_holds_the_numbers_at_full_precision_and_what_the_pictures_draw(tmp_path):
    metrics, content = written(tmp_path / "metrics.json")
    assert (content["schema"], content["version"]) == ("attention-metrics", 1)
    assert content["meta"] == {"checkpoint": "a.pt", "seed": 0}
    for i, sample in enumerate(content["samples"]):
        assert (sample["goal_col"], sample["n_context"]) == (i, 100)
        assert sample["title"] == f"goal (2, {i}), step {100 * i}"
    assert [layer["layer"] for layer in content["layers"]] == [0, 1, 2, 5]
    for place, layer in enumerate(content["layers"]):
        for name in NAMES:
            values = metrics.of(name)[place]
            assert layer["per_sample"][name] == values.tolist()
            assert layer["head_means"][name] == metrics.of_heads(name, place).mean(0).tolist()
            assert layer["over_samples"][name] == metrics.summaries(place)[name]
    assert content["overall"]["entropy"]["mean"] == metrics.summaries()["entropy"]["mean"]
    assert content["uniform"] == metrics.uniform_mean()
    found = [insight.pattern for insight in find_patterns(metrics)]
    assert [insight["pattern"] for insight in content["insights"]] == found
    assert set(content["definitions"]) == set(NAMES)
    drawn = content["drawn"]["layers"]
    assert list(drawn) == ["0", "5"]
    assert all(list(samples) == ["0", "2"] for samples in drawn.values())
    assert drawn["5"]["2"]["query_rows"]["mean"] == rounded(uniform(100)) == [0.00990099] * 101
    assert content["drawn"]["uniform_received"] == {"101": rounded(uniform_received(101))}
    first, second, third = content["samples"]
    assert third["episode_starts"] == [0, 20, 40, 60, 80]
    assert third["rewarded"][:3] == [0, 3, 6]
    assert "rewarded" not in second
    part = ["query"] + ["transition"] * 100
    assert third["tokens"] == {"transition": [*range(-1, 100)], "part": part, "decides": 0}
    assert "tokens" not in first


def test_what_is_not_a_finite_number_or_no_plain_type_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="JSON compliant"):
        written(path, loss=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        written(path, rows=rounded(np.array([[1.0, np.nan]])))
    with pytest.raises(TypeError, match="plain types"):
        written(path, model=object())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    assert rounded(np.array([[1 / 3, np.nan]]), None) == [[0.333333, None]]


def table_of(*args):
    lines = "".join(csv_lines(report.csv_rows(*args))).splitlines(keepends=True)
    return [*csv.reader(lines)]


def test_csv_has_a_row_a_sample_layer_and_head():
    metrics = some_metrics()
    header, *rows = table_of(metrics, some_decisions())
    assert header == [*PLACE, *NAMES]
    assert len(rows) == 3 * 4 * (2 + 1)
    assert [row[5] for row in rows[:3]] == ["0", "1", "mean"]
    sample, layer = rows[(2 * 4 + 3) * 3 :], metrics.values[2, 3]
    assert sample[1][:7] == ["2", "2", "2", "200", "5", "1", "100"]
    for row, values in zip(sample, layer, strict=True):
        assert [float(value) for value in row[7:]] == values.tolist()


def test_csv_has_a_column_for_each_label_and_no_head_that_there_is_not():
    two = [np.stack([[uniform(4)] * n] * 2) for n in (1, 2)]
    metrics = measured(*two, heads=[[3], [3, 7]])
    samples = [decision(4, labels={"task": "key, then door", "step": 7})]
    samples += [decision(4, labels={"goal": 1, "step": 8})]
    header, *rows = table_of(metrics, samples)
    assert header[:6] == ["sample", "task", "step", "goal", "layer", "head"]
    assert rows[0][:4] == ["0", "key, then door", "7", ""]
    assert rows[5][:4] == ["1", "", "8", "1"]
    places = [row[4:6] for row in rows[:5]]
    assert places == [["0", "3"], ["0", "mean"], ["1", "3"], ["1", "7"], ["1", "mean"]]
    assert not any("nan" in row for row in rows)
