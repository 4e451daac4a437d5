"""What the console shows and what the files hold, against the numbers they come from."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from attention_rows import decision, measured, planted, random_rows, uniform

from historylens.common.files import rounded, write_atomically, write_json
from historylens.common.text import cap, labelled, listed
from historylens.insights import find_patterns
from historylens.metrics import NAMES, SUMMARY_METRICS, uniform_received
from historylens.report import (
    insight_blocks,
    layer_table,
    metrics_json,
    overall_block,
    pattern_table,
    write_csv,
)
from historylens.tokens import Tokens

LABELS = ("goal_row", "goal_col", "step")
PLACE = ["sample", *LABELS, "layer", "head", "n_context"]


def some_decisions(n=100, n_samples=3):
    return [
        decision(
            n,
            np.arange(n) // 20,
            range(0, n, 3),
            f"goal (2, {i}), step {100 * i}",
            {"goal_row": 2, "goal_col": i, "step": 100 * i},
        )
        for i in range(n_samples)
    ]


def some_metrics(n=100, slope=0.05):
    """Three samples, four layers of two heads."""
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, 3, 2, n + 1, sharpness=2, slope=slope) for _ in range(4)]
    return measured(*rows, numbers=[0, 1, 2, 5], decisions=some_decisions(n))


def of_samples(*rows):
    """One layer of one head; a sample for each row `(T,)`."""
    return measured(np.stack(rows)[:, None])


def blocks_of(metrics):
    return insight_blocks(find_patterns(metrics), metrics)


# Console


def test_overall_block_has_the_agreed_form_and_the_pooled_numbers():
    metrics = some_metrics()
    lines = overall_block(metrics).splitlines()
    assert lines[0] == "OVERALL ATTENTION STATISTICS"
    assert lines[1] == "=" * 36
    assert re.fullmatch(r"Mean context attention: \d\.\d{4} ± \d\.\d{4}", lines[2])
    assert re.fullmatch(r"Attention concentration \(std\): \d\.\d{4} ± \d\.\d{4}", lines[3])
    entropy = metrics.summaries()["entropy"]
    assert lines[4] == f"Attention entropy: {entropy.mean:.4f} ± {entropy.std:.4f}"
    assert re.match(r"Recent/Distant ratio: (\d+\.\d\d|> 1000) ± (\d+\.\d\d|> 1000)", lines[5])
    assert len(lines) == 6


def with_ratios(*ratios):
    return [np.array([0.1, 0.0, 0.0, 0.1 * ratio, 0.0]) for ratio in ratios]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([uniform(20), uniform(20)], "1.00 ± 0.00"),
        (with_ratios(3.0, 3.1, 9.0), "5.03 ± 2.81 (median 3.10)"),
        (with_ratios(1.0, 1.0, 1.2), "1.07 ± 0.09"),  # mean and median part at a tenth
        (with_ratios(1.0, 1.0, 1.6), "1.20 ± 0.28 (median 1.00)"),
        ([planted(20, [19]), uniform(20), uniform(20)], "> 1000 ± > 1000 (median 1.00)"),
        ([planted(20, [19]), planted(20, [18])], "> 1000 ± 0.00"),
    ],
)
def test_the_ratio_is_capped_and_shows_its_median_where_it_tells_another_story(rows, text):
    assert overall_block(of_samples(*rows)).endswith(f"Recent/Distant ratio: {text}")


def test_no_negative_zero_is_printed():
    metrics = of_samples(planted(20, [10]))
    assert "-0.0" not in overall_block(metrics) + layer_table(metrics)


def test_layer_table_has_an_aligned_line_a_layer_and_uniform_last():
    metrics = some_metrics()
    lines = layer_table(metrics).splitlines()
    assert "n = 100 context tokens, 3 samples)" in lines[0]
    table = lines[1:7]
    assert [line.split()[0] for line in table] == ["layer", "0", "1", "2", "5", "uniform"]
    entropy = metrics.summaries(2)["entropy"]
    assert f"{entropy.mean:.4f} ± {entropy.std:.4f}" in table[3]
    even = [f"{metrics.uniform_mean()[name]:.4f}" for name in SUMMARY_METRICS[:3]]
    assert table[5].split() == ["uniform", *even, "1.00", "100.0", "1.00"]
    end = table[0].index("mean attention") + len("mean attention")
    assert all(line[end : end + 2] == "  " for line in table[:5])
    assert len({line.index("±") for line in table[1:5]}) == 1


@pytest.mark.parametrize("n", [1, 3, 8, 100, 2000])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_console_output_fits_100_columns(n, slope):
    metrics = some_metrics(n, slope)
    effect = "dropping it changed the action in 3% of decisions; " * 3
    insights = [replace(insight, effect=effect) for insight in find_patterns(metrics)]
    for block in (
        layer_table(metrics),
        overall_block(metrics),
        pattern_table(metrics),
        insight_blocks(insights, metrics),
        labelled({"Checkpoint": "checkpoints/run " * 12, "Step": "9"}),
    ):
        for line in block.splitlines():
            assert len(line) + len(re.findall("[💡📊🧪]", line)) <= 100, line  # emoji take two
        assert "nan" not in block.lower().replace("dominant", "")


def test_labelled_lines_are_aligned():
    lines = labelled({"Checkpoint": "a.pt", "Step": "9", "Long": "word " * 40}).splitlines()
    assert lines[0] == "Checkpoint: a.pt"
    assert lines[1] == "Step:       9"
    assert lines[3].startswith(" " * 12 + "word")


def test_numbers_and_layers_read_as_words():
    assert [cap(x) for x in (3.104, 1000.0, 1000.01)] == ["3.10", "1000.00", "> 1000"]
    assert listed([2]) == "layer 2"
    assert listed([0, 1]) == "layers 0 and 1"
    assert listed([0, 1, 3]) == "layers 0, 1 and 3"


def test_pattern_table_says_yes_exactly_where_the_rule_holds():
    lines = pattern_table(measured(uniform(100), planted(100, [50]))).splitlines()
    assert lines[3].split() == ["rule", ">", "2.0", ">", "2.0", "<", "1.5", ">", "50%"]
    answers = {line[:7].strip(): re.findall("yes|no", line) for line in lines[4:]}
    assert answers == {
        "layer 0": ["no", "yes", "no", "no"],
        "layer 1": ["no", "no", "yes", "yes"],
        "all": ["no", "yes", "no", "no"],
    }


def test_insight_block_starts_with_headline_and_advice_and_holds_it_all():
    metrics = of_samples(planted(100, [99]))
    first, *others = find_patterns(metrics)
    text = insight_blocks([replace(first, effect="Dropped: 2% of actions."), *others], metrics)
    assert text.startswith(
        "💡 INSIGHT: Strong recency bias detected!\n"
        "   Consider compressing or removing distant history.\n"
    )
    assert "   🧪 Dropped: 2% of actions." in text
    assert text.count("💡 INSIGHT:") == 3
    for insight in (first, *others):
        for strategy in insight.strategies:
            assert f"   - {strategy}" in text
        assert f"   - Example: {insight.example}" in text


def test_a_caveat_is_printed_with_its_insight_and_no_pattern_is_said_and_explained():
    text = blocks_of(of_samples(planted(100, range(40, 49))))
    assert "⚠️  Entropy > 2.0 nats calls this uniform" in text
    text = blocks_of(of_samples(uniform(8)))
    assert text.startswith("💡 INSIGHT: No single pattern")
    assert "ℹ️  Uniform attention cannot be recognised" in text


EVEN, ONE, ITSELF = uniform(100), planted(100, [50]), planted(100, [0], 0.0)


@pytest.mark.parametrize(
    ("fourth", "sixth", "doubt"),
    [
        (ONE, ONE, ""),
        (ONE, ITSELF, " (in layer 6 by the absolute rule only)"),
        (ITSELF, ITSELF, " (by the absolute rule only)"),
    ],
)
def test_layers_with_the_same_difference_share_one_block(fourth, sixth, doubt):
    text = blocks_of(measured(EVEN, EVEN, EVEN, EVEN, fourth, EVEN, sixth))
    assert "WHERE LAYERS DIFFER FROM THE WHOLE" in text
    headline = f"💡 INSIGHT: Focused attention detected in layers 4 and 6!{doubt}\n"
    assert text.count(headline) == 1
    assert text.count("Layer 4: The mean entropy") == text.count("Layer 6: The mean entropy") == 1


# metrics.json


def written(path, **more):
    """metrics.json of three samples, of which 0 and 2 are drawn; the latter has its own tokens."""
    metrics = some_metrics()
    arrays = {"query_rows": {"mean": rounded(uniform(100))}}
    tokens = {0: Tokens.of(100), 2: Tokens.of(100, query="first")}
    content = metrics_json(
        metrics,
        some_decisions(),
        find_patterns(metrics),
        {"checkpoint": "a.pt", "seed": 0, **more},
        {layer: {0: arrays, 2: arrays} for layer in (0, 5)},
        tokens,
    )
    write_json(path, content)
    return metrics, json.loads(path.read_text())


def test_metrics_json_holds_the_numbers_at_full_precision(tmp_path):
    metrics, content = written(tmp_path / "metrics.json")
    assert (content["schema"], content["version"]) == ("attention-metrics", 1)
    assert content["meta"] == {"checkpoint": "a.pt", "seed": 0}
    assert [sample["goal_col"] for sample in content["samples"]] == [0, 1, 2]
    assert content["samples"][1]["title"] == "goal (2, 1), step 100"
    assert content["samples"][1]["n_context"] == 100
    assert [layer["layer"] for layer in content["layers"]] == [0, 1, 2, 5]
    for place, layer in enumerate(content["layers"]):
        for name in NAMES:
            values = metrics.of(name)[place]
            assert layer["per_sample"][name] == values.tolist()
            assert layer["head_means"][name] == metrics.of_heads(name, place).mean(0).tolist()
            assert layer["over_samples"][name] == vars(metrics.summaries(place)[name])
    assert content["overall"]["entropy"]["mean"] == metrics.summaries()["entropy"].mean
    assert content["uniform"] == metrics.uniform_mean()
    found = find_patterns(metrics)
    assert [insight["pattern"] for insight in content["insights"]] == [i.pattern for i in found]
    assert set(content["definitions"]) == set(NAMES)


def test_metrics_json_says_what_the_pictures_draw(tmp_path):
    _, content = written(tmp_path / "metrics.json")
    drawn = content["drawn"]["layers"]
    assert [(layer, *samples) for layer, samples in drawn.items()] == [
        ("0", "0", "2"), ("5", "0", "2"),
    ]  # fmt: skip
    assert drawn["5"]["2"]["query_rows"]["mean"] == rounded(uniform(100))
    assert content["drawn"]["uniform_received"] == {"101": rounded(uniform_received(101))}
    first, second, third = content["samples"]
    assert third["episode_starts"] == [0, 20, 40, 60, 80]
    assert third["rewarded"][:3] == [0, 3, 6]
    assert "rewarded" not in second
    part = ["query"] + ["transition"] * 100
    assert third["tokens"] == {"transition": [*range(-1, 100)], "part": part, "decides": 0}
    assert "tokens" not in first


def test_metrics_json_refuses_what_is_not_a_finite_number(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="JSON compliant"):
        written(path, loss=float("nan"))
    with pytest.raises(TypeError, match="plain types"):
        written(path, model=object())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_rounding_keeps_six_significant_digits():
    assert rounded(np.array([[1.23456789e-7, 0.1]])) == [[1.23457e-07, 0.1]]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("historylens.common.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# metrics.csv


def test_csv_has_a_row_a_sample_layer_and_head(tmp_path):
    metrics = some_metrics()
    write_csv(tmp_path / "metrics.csv", metrics, some_decisions(), LABELS)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [*PLACE, *NAMES]
    assert len(table) == 3 * 4 * (2 + 1)
    assert [row["head"] for row in table[:3]] == ["0", "1", "mean"]
    sample, layer = table[(2 * 4 + 3) * 3 :], metrics.values[2, 3]
    assert [sample[1][name] for name in PLACE] == ["2", "2", "2", "200", "5", "1", "100"]
    for row, values in zip(sample, layer, strict=True):
        assert [float(row[name]) for name in NAMES] == values.tolist()


def test_csv_has_the_heads_that_a_layer_has_by_their_numbers(tmp_path):
    rng = np.random.default_rng(0)
    metrics = measured(random_rows(rng, 1, 1, 5), random_rows(rng, 1, 2, 5), heads=[[3], [3, 7]])
    write_csv(tmp_path / "metrics.csv", metrics, [decision(4)], ())
    text = (tmp_path / "metrics.csv").read_text()
    places = [line.split(",")[1:3] for line in text.splitlines()[1:]]
    assert places == [["0", "3"], ["0", "mean"], ["1", "3"], ["1", "7"], ["1", "mean"]]
    assert "nan" not in text


def test_csv_has_the_columns_asked_for_whatever_labels_a_sample_has(tmp_path):
    sample = decision(4, labels={"task": "key, then door", "step": 7})
    columns = ("goal", "step", "task")
    write_csv(tmp_path / "a.csv", measured(uniform(4), n_samples=1), [sample], columns)
    with open(tmp_path / "a.csv", newline="") as file:
        header, first, *_ = csv.reader(file)
    assert header[:4] == ["sample", *columns]
    assert first[:4] == ["0", "", "7", "key, then door"]
