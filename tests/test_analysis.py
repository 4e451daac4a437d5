"""One batched pass over decisions: every number right, the model left as it was."""

from collections import Counter

import numpy as np
import plain_model
import pytest
import torch
from conftest import make_histories, sharp_model
from torch.nn.modules import module as torch_module

import analysis
from analysis import analyse
from attention.metrics import SUMMARY_METRICS, concatenate
from decisions import Decision
from subject import ADSubject, fused_attention

DECISIONS = [Decision(0, 12), Decision(2, 29), Decision(1, 17), Decision(1, 28, 2), Decision(0, 14)]


@pytest.fixture
def histories(tiny_histories):
    return tiny_histories


def logits_without_capture(model, histories, decision):
    tensors = [
        torch.tensor(part)[None]
        for part in zip(*plain_decision(histories, decision)[0], strict=True)
    ]
    query = torch.tensor([plain_decision(histories, decision)[1]])
    with torch.inference_mode(), fused_attention():
        return model(*tensors, query)[0]


def plain_decision(histories, decision):
    place = (decision.history, decision.step, decision.stride, 11)
    return plain_model.decision(vars(histories), *place)


def hooks_of(model):
    """Every hook on the model's modules and every global one."""
    found = []
    for part in model.modules():
        found += [*part._forward_hooks, *part._forward_pre_hooks, *part._backward_hooks]
    return found + [
        *torch_module._global_forward_hooks,
        *torch_module._global_forward_pre_hooks,
        *torch_module._global_forward_hooks_always_called,
    ]


@pytest.mark.parametrize("n_drawn", [0, 2, 5])
def test_outputs_equal_those_without_capture(tiny_model, histories, n_drawn):
    batches = list(analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn))
    logits = torch.cat([batch.logits for batch in batches])
    for found, decision in zip(logits, DECISIONS, strict=True):
        expected = logits_without_capture(tiny_model, histories, decision)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_rows_metrics_and_logits_equal_the_plain_model(tiny_model, tiny_config, histories):
    tensors = {k: v.numpy().astype(np.float64) for k, v in tiny_model.state_dict().items()}
    (batch,) = analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=5)
    for i, decision in enumerate(DECISIONS):
        inputs = plain_decision(histories, decision)
        logits, rows = plain_model.run_model(tensors, vars(tiny_config), *inputs)
        np.testing.assert_allclose(batch.logits[i], logits, atol=1e-4)
        for layer in (0, 1):
            found = batch.attention[layer].query_rows[i]
            np.testing.assert_allclose(found, rows[layer], atol=1e-6)
            for name, value in plain_model.four_metrics(rows[layer].mean(axis=0)).items():
                assert batch.metrics.layers[layer].mean[name][i] == pytest.approx(value, rel=1e-5)


def test_each_layer_runs_once_a_batch_and_the_last_row_of_a_map_is_the_querys(
    tiny_model, histories
):
    runs = Counter()
    handles = [
        layer.register_forward_hook(lambda layer, *_: runs.update([layer]))
        for layer in tiny_model.transformer_encoder.layers
    ]
    (batch,) = analyse(ADSubject(tiny_model, histories, DECISIONS), [1], n_drawn=5)
    for handle in handles:
        handle.remove()
    assert sorted(runs.values()) == [1, 1]
    assert list(batch.attention) == [1]
    layer = batch.attention[1]
    assert layer.maps.shape == (5, 2, 12, 12)
    torch.testing.assert_close(layer.maps[:, :, -1], layer.query_rows)


@pytest.mark.parametrize("n_drawn", [0, 3])
def test_batches_of_any_size_give_the_same_metrics_in_order(
    tiny_model, histories, monkeypatch, n_drawn
):
    (whole,) = analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=5)
    monkeypatch.setattr(analysis, "MAX_DRAWN", 2)
    monkeypatch.setattr(analysis, "MAX_TOKENS", 12)
    batches = list(analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn))
    drawn = [len(batch.samples) for batch in batches if batch.has_maps]
    assert drawn == [2, 1][: n_drawn and 2]
    assert [s.index for batch in batches for s in batch.samples] == list(range(5))
    parts = concatenate([batch.metrics for batch in batches])
    for name in SUMMARY_METRICS:
        np.testing.assert_allclose(parts.pooled(name), whole.metrics.pooled(name), rtol=1e-5)


def test_nothing_that_is_not_drawn_carries_maps(tiny_model, histories):
    drawn, rest = analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=2)
    assert drawn.has_maps
    assert not rest.has_maps
    for layer in rest.attention.values():
        assert layer.maps is None
        assert layer.received is None


def test_a_subset_of_layers_is_measured_as_among_all(tiny_model, histories):
    (whole,) = analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=0)
    (one,) = analyse(ADSubject(tiny_model, histories, DECISIONS), [1], n_drawn=0)
    assert [layer.layer for layer in one.metrics.layers] == [1]
    for name in SUMMARY_METRICS:
        np.testing.assert_array_equal(one.metrics.pooled(name), whole.metrics.pooled(name)[1:])


def test_no_hook_is_left(tiny_model, histories):
    before = hooks_of(tiny_model)
    list(analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=2))
    assert hooks_of(tiny_model) == before == []


def test_no_hook_is_left_after_an_error_inside_the_model(tiny_model, histories, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken layer")

    monkeypatch.setattr(tiny_model.transformer_encoder.layers[1], "forward", broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        list(analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=2))
    assert hooks_of(tiny_model) == []


def test_the_model_keeps_its_mode_and_its_weights(tiny_model, histories):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    list(analyse(ADSubject(tiny_model, histories, DECISIONS), [0, 1], n_drawn=2))
    assert not any(part.training for part in tiny_model.modules())
    assert all(torch.equal(before[k], v) for k, v in tiny_model.state_dict().items())


def test_a_longer_context_than_an_episode_is_read_in_the_order_of_time(tiny_config):
    histories = make_histories(n_episodes=12)
    model = sharp_model(tiny_config)
    found = {}
    for stride in (1, 3):
        decision = Decision(1, 57, stride)
        (batch,) = analyse(ADSubject(model, histories, [decision]), [0], n_drawn=0)
        found[stride] = batch.logits[0]
        expected = logits_without_capture(model, histories, decision)
        torch.testing.assert_close(found[stride], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found[1], found[3], atol=1e-3)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_pass_leaves_the_fast_path_out_and_its_switch_as_it_was(
    tiny_model, histories, monkeypatch, enabled
):
    switch, forward, seen = torch.backends.mha, tiny_model.forward, []
    was = switch.get_fastpath_enabled()
    switch.set_fastpath_enabled(enabled)
    try:
        monkeypatch.setattr(
            tiny_model,
            "forward",
            lambda *a: (seen.append(switch.get_fastpath_enabled()), forward(*a))[1],
        )
        list(analyse(ADSubject(tiny_model, histories, DECISIONS), [0], n_drawn=1))
        assert seen
        assert not any(seen)
        assert switch.get_fastpath_enabled() == enabled
    finally:
        switch.set_fastpath_enabled(was)
