"""What the console shows and what the files hold, against the numbers they come from."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from attention.files import (
    drawn_arrays,
    metrics_json,
    rounded,
    write_atomically,
    write_csv,
    write_json,
)
from attention.insights import find_patterns
from attention.metrics import ALL_METRICS, SUMMARY_METRICS, collect, concatenate, uniform_received
from attention.report import (
    insight_blocks,
    layer_table,
    loaded_block,
    overall_block,
    pattern_table,
)
from attention.samples import Sample

FIRST_COLUMNS = ["sample", "goal_row", "goal_col", "history", "step", "stride", "layer", "head"]
FIRST_COLUMNS += ["n_context", *SUMMARY_METRICS]


def make_result(n=100, n_samples=3, n_layers=4, n_heads=2, seed=0, slope=0.05):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_layers, n_samples, n_heads, n + 1)) * 2 + slope * np.arange(n + 1)
    rows = np.exp(scores - scores.max(-1, keepdims=True))
    rows /= rows.sum(-1, keepdims=True)
    samples = [
        Sample(
            i,
            f"goal (2, {i}), step {100 * i}",
            n,
            np.arange(0, n, 20),
            np.arange(n) % 3 == 0,
            {"goal_row": 2, "goal_col": i, "history": 1, "step": 100 * i, "stride": 4},
        )
        for i in range(n_samples)
    ]
    return list(rows), collect(list(rows), samples)


def of_rows(*rows):
    """One layer; each row `(T,)` is a sample's only head."""
    n = rows[0].size - 1
    samples = [Sample(i, "", n, np.array([0]), np.zeros(n, bool)) for i in range(len(rows))]
    return collect([np.stack(rows)[:, None]], samples)


def one_hot(n, position):
    return np.eye(n + 1)[position]


def columns(text):
    """Widest line in console columns: emoji take two."""
    return max(len(line) + len(re.findall("[💡📊🧪]", line)) for line in text.splitlines())


def test_overall_block_has_the_agreed_form():
    lines = overall_block(make_result()[1]).splitlines()
    assert lines[0] == "OVERALL ATTENTION STATISTICS"
    assert lines[1] == "=" * 36
    number = r"\d+\.\d{4} ± \d+\.\d{4}"
    assert re.fullmatch(f"Mean context attention: {number}", lines[2])
    assert re.fullmatch(rf"Attention concentration \(std\): {number}", lines[3])
    assert re.fullmatch(f"Attention entropy: {number}", lines[4])
    assert re.match(r"Recent/Distant ratio: (\d+\.\d\d|> 1000) ± (\d+\.\d\d|> 1000)", lines[5])
    assert len(lines) == 6


def test_overall_block_shows_the_pooled_numbers():
    result = make_result()[1]
    entropy = result.overall()["entropy"]
    assert f"Attention entropy: {entropy.mean:.4f} ± {entropy.std:.4f}\n" in overall_block(result)


def test_the_ratio_is_plain_where_mean_and_median_agree():
    even = np.full(21, 1 / 21)
    assert overall_block(of_rows(even, even)).endswith("Recent/Distant ratio: 1.00 ± 0.00")


def test_the_ratio_shows_its_median_where_it_parts_from_the_mean():
    rows = []
    for last in (0.3, 0.31, 0.9):
        row = np.full(5, 0.0)
        row[0], row[3], row[4] = 0.1, last, 0.0
        rows.append(row)
    assert overall_block(of_rows(*rows)).endswith("Recent/Distant ratio: 5.03 ± 2.81 (median 3.10)")


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.2, "1.07 ± 0.09"), (1.6, "1.20 ± 0.28 (median 1.00)")]
)
def test_mean_and_median_part_at_a_tenth(ratio, text):
    rows = [np.array([0.1, 0.0, 0.0, 0.1 * x, 0.0]) for x in (1.0, 1.0, ratio)]
    assert overall_block(of_rows(*rows)).endswith(f"Recent/Distant ratio: {text}")


def test_a_huge_ratio_is_capped_but_its_median_is_not():
    even = np.full(21, 1 / 21)
    block = overall_block(of_rows(one_hot(20, 19), even, even))
    assert block.endswith("Recent/Distant ratio: > 1000 ± > 1000 (median 1.00)")
    huge = overall_block(of_rows(one_hot(20, 19), one_hot(20, 18)))
    assert huge.endswith("Recent/Distant ratio: > 1000 ± 0.00")


def test_no_negative_zero_is_printed():
    assert "-0.0" not in overall_block(of_rows(one_hot(20, 10)))
    assert "-0.0" not in layer_table(of_rows(one_hot(20, 10)))


def test_layer_table_has_a_line_a_layer_and_uniform_last():
    result = make_result()[1]
    lines = layer_table(result).splitlines()
    assert "n = 100 context tokens, 3 samples" in lines[0]
    table = lines[1:7]
    assert [line.split()[0] for line in table] == ["layer", "0", "1", "2", "3", "uniform"]
    entropy = result.layers[2].summary()["entropy"]
    assert f"{entropy.mean:.4f} ± {entropy.std:.4f}" in table[3]
    uniform = [f"{result.uniform_mean()[name]:.4f}" for name in SUMMARY_METRICS[:3]]
    assert table[5].split() == ["uniform", *uniform, "1.00", "100.0", "1.00"]


def test_layer_table_columns_are_aligned():
    lines = layer_table(make_result()[1]).splitlines()[1:6]
    ends = lines[0].index("mean attention") + len("mean attention")
    assert all(line[ends : ends + 2] == "  " for line in lines)
    assert len({line.index("±") for line in lines[1:]}) == 1


@pytest.mark.parametrize("n", [1, 3, 8, 100, 2000])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_console_output_fits_100_columns(n, slope):
    result = make_result(n=n, slope=slope)[1]
    insights = [
        replace(i, effect="dropping it changed the action in 3% of decisions; " * 3)
        for i in find_patterns(result)
    ]
    blocks = [
        layer_table(result),
        overall_block(result),
        pattern_table(result),
        insight_blocks(insights, result),
        loaded_block({"Checkpoint": "checkpoints/run " * 12, "Step": "9"}),
    ]
    for block in blocks:
        assert columns(block) <= 100, block
        assert "nan" not in block.lower().replace("dominant", "")


def test_loaded_block_aligns_its_texts():
    block = loaded_block({"Checkpoint": "a.pt", "Step": "9", "Long": "word " * 40})
    lines = block.splitlines()
    assert lines[0] == "Checkpoint: a.pt"
    assert lines[1] == "Step:       9"
    assert lines[3].startswith(" " * 12 + "word")


def test_pattern_table_says_yes_exactly_where_the_rule_holds():
    even, one = np.full(101, 1 / 101), one_hot(100, 50)
    samples = [Sample(0, "", 100, np.array([0]), np.zeros(100, bool))]
    lines = pattern_table(collect([even[None, None], one[None, None]], samples)).splitlines()
    answers = {line[:7].strip(): re.findall("yes|no", line) for line in lines[4:]}
    assert answers == {
        "layer 0": ["no", "yes", "no", "no"],
        "layer 1": ["no", "no", "yes", "yes"],
        "all": ["no", "yes", "no", "no"],
    }


def test_insight_block_starts_with_headline_and_advice_and_holds_it_all():
    result = of_rows(one_hot(100, 99))
    first, *others = find_patterns(result)
    text = insight_blocks([replace(first, effect="Dropped: 2% of actions."), *others], result)
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


def test_a_caveat_is_printed_with_its_insight():
    row = np.zeros(101)
    row[40:49] = 1 / 9
    result = of_rows(row)
    assert "⚠️  Entropy > 2.0 nats calls this uniform" in insight_blocks(
        find_patterns(result), result
    )


def test_no_pattern_is_said_and_explained():
    result = of_rows(np.full(9, 1 / 9))
    text = insight_blocks(find_patterns(result), result)
    assert text.startswith("💡 INSIGHT: No single pattern")
    assert "ℹ️  Uniform attention cannot be recognised" in text


def test_layers_with_the_same_difference_share_one_block():
    even, one = np.full((1, 1, 101), 1 / 101), one_hot(100, 50)[None, None]
    samples = [Sample(0, "", 100, np.array([0]), np.zeros(100, bool))]
    result = collect([even, even, even, even, one, even, one], samples)
    text = insight_blocks(find_patterns(result), result)
    assert "WHERE LAYERS DIFFER FROM THE WHOLE" in text
    assert text.count("💡 INSIGHT: Focused attention detected in layers 4 and 6!\n") == 1
    assert text.count("Layer 4: The mean entropy") == text.count("Layer 6: The mean entropy") == 1


def test_doubt_about_some_layers_of_a_shared_block_names_them():
    even, one = np.full((1, 1, 101), 1 / 101), one_hot(100, 50)[None, None]
    itself = one_hot(100, 100)[None, None]
    samples = [Sample(0, "", 100, np.array([0]), np.zeros(100, bool))]
    result = collect([even, even, even, even, one, even, itself], samples)
    text = insight_blocks(find_patterns(result), result)
    assert "detected in layers 4 and 6! (in layer 6 by the absolute rule only)\n" in text
    result = collect([even, even, even, even, itself, even, itself], samples)
    text = insight_blocks(find_patterns(result), result)
    assert "detected in layers 4 and 6! (by the absolute rule only)\n" in text


def full_content(result, rows):
    drawn = {
        layer: {s: drawn_arrays(rows[layer][s], rows[layer][s]) for s in (0, 2)} for layer in (0, 3)
    }
    return metrics_json(result, find_patterns(result), {"checkpoint": "a.pt", "seed": 0}, drawn)


def test_metrics_json_holds_the_numbers_at_full_precision(tmp_path):
    rows, result = make_result()
    write_json(tmp_path / "metrics.json", full_content(result, rows))
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert (content["schema"], content["version"]) == ("attention-metrics", 1)
    assert content["meta"] == {"checkpoint": "a.pt", "seed": 0}
    assert [s["goal_col"] for s in content["samples"]] == [0, 1, 2]
    for layer, entry in zip(result.layers, content["layers"], strict=True):
        assert entry["layer"] == layer.layer
        for name in ALL_METRICS:
            np.testing.assert_array_equal(entry["per_sample"][name], layer.mean[name])
            assert entry["head_means"][name] == layer.head_means()[name].tolist()
            assert entry["over_samples"][name]["median"] == np.median(layer.mean[name])
    assert content["overall"]["entropy"]["mean"] == result.overall()["entropy"].mean
    assert content["uniform"] == result.uniform_mean()
    assert {i["pattern"] for i in content["insights"]} == {i.pattern for i in find_patterns(result)}
    assert set(content["definitions"]) == set(ALL_METRICS)


def test_metrics_json_holds_what_the_pictures_draw(tmp_path):
    rows, result = make_result()
    write_json(tmp_path / "m.json", full_content(result, rows))
    content = json.loads((tmp_path / "m.json").read_text())
    drawn = content["drawn"]["layers"]
    assert {layer: set(samples) for layer, samples in drawn.items()} == {
        "0": {"0", "2"},
        "3": {"0", "2"},
    }
    entry = drawn["3"]["2"]["query_rows"]
    assert np.array(entry["heads"]) == pytest.approx(rows[3][2], rel=1e-5)
    assert np.array(entry["mean"]) == pytest.approx(rows[3][2].mean(0), rel=1e-5)
    assert np.shape(drawn["0"]["0"]["received"]["heads"]) == (2, 101)
    uniform = content["drawn"]["uniform_received"]["101"]
    assert uniform == pytest.approx(uniform_received(101).tolist(), rel=1e-5)
    assert content["samples"][2]["episode_starts"] == [0, 20, 40, 60, 80]
    assert content["samples"][2]["rewarded"][:3] == [0, 3, 6]
    assert "rewarded" not in content["samples"][1]


def test_metrics_json_refuses_what_is_not_a_finite_number(tmp_path):
    rows, result = make_result()
    path = tmp_path / "metrics.json"
    path.write_text("before")
    content = full_content(result, rows)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, content | {"meta": {"loss": float("nan")}})
    with pytest.raises(TypeError, match=r"plain types for metrics\.json"):
        write_json(path, content | {"meta": {"model": object()}})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        rows, result = make_result()
        write_json(tmp_path / f"{name}.json", full_content(result, rows))
        write_csv(tmp_path / f"{name}.csv", result)
    for suffix in ("json", "csv"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_csv_has_a_row_a_sample_layer_and_head(tmp_path):
    _, result = make_result()
    write_csv(tmp_path / "metrics.csv", result)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [*FIRST_COLUMNS, *ALL_METRICS[4:]]
    assert len(table) == 3 * 4 * (2 + 1)
    assert [row["head"] for row in table[:3]] == ["0", "1", "mean"]
    row = table[(2 * 4 + 3) * 3 + 1]
    assert [row[c] for c in FIRST_COLUMNS[:9]] == ["2", "2", "2", "1", "200", "4", "3", "1", "100"]
    for name in ALL_METRICS:
        assert float(row[name]) == result.layers[3].heads[name][2, 1], name


def test_csv_keeps_its_columns_where_samples_carry_other_labels(tmp_path):
    labels = {"task": "key, then door", "step": 7}
    sample = Sample(0, "", 4, np.array([0]), np.zeros(4, bool), labels)
    result = collect([np.full((1, 1, 5), 0.2)], [sample])
    write_csv(tmp_path / "a.csv", concatenate([result]))
    with open(tmp_path / "a.csv", newline="") as file:
        header, first, *_ = csv.reader(file)
    assert header[:13] == FIRST_COLUMNS
    assert header[-1] == "task"
    assert first[1:6] == ["", "", "", "7", ""]
    assert first[-1] == "key, then door"
    write_csv(tmp_path / "b.csv", result, label_columns=("task",))
    assert (tmp_path / "b.csv").read_text().startswith("sample,task,layer,head,n_context,mean")


def test_rounding_keeps_six_significant_digits():
    assert rounded([[1.23456789e-7, 0.1]]) == [[1.23457e-07, 0.1]]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("attention.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
