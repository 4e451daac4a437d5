"""Batched passes over decisions: maps of those drawn alone, the same numbers in any batches."""

import numpy as np
import pytest
import torch
from conftest import ad_agent

from historylens.analysis import AnalysisConfig
from historylens.analysis.job import Job, batches
from historylens.common.processes import ALONE
from historylens.metrics import Metrics

PLACES = [(0, 12, 1), (2, 29, 1), (1, 17, 1), (1, 28, 2), (0, 14, 1)]  # history, step, stride


@pytest.fixture
def agent(tiny_model, tiny_histories):
    return ad_agent(tiny_model, tiny_histories, PLACES)


def job_of(agent, tmp_path, **settings) -> Job:
    config = AnalysisConfig(out=str(tmp_path / "out"), num_figures=0, **settings)
    return Job.of(agent, config, ALONE)


def measured(job, parts=((range(5), ()),)) -> np.ndarray:
    metrics = Metrics(5, job.layers, job.heads)
    for batch in batches(job, parts):
        batch.measure(metrics)
    return metrics.gather(ALONE).values


def test_the_last_row_of_a_map_is_the_querys_and_only_what_is_drawn_has_maps(agent, tmp_path):
    job = job_of(agent, tmp_path, layers=[1])
    drawn, rest = batches(job, [([0, 1], [0, 1]), ([2, 3, 4], [])])
    assert list(drawn.attention) == list(rest.attention) == [1]
    layer = drawn.attention[1]
    assert layer.maps.shape == (2, 2, 12, 12)
    torch.testing.assert_close(layer.maps[:, :, -1], layer.query_rows)
    assert rest.attention[1].maps is rest.attention[1].received is None


def test_batches_of_any_size_and_subsets_are_measured_as_the_whole(agent, tmp_path):
    job = job_of(agent, tmp_path)
    whole = measured(job)
    for size in (1, 2, 4):
        parts = [(range(i, min(5, i + size)), []) for i in range(0, 5, size)]
        np.testing.assert_allclose(measured(job, parts), whole, rtol=1e-5, atol=1e-6)
    one = measured(job_of(agent, tmp_path, layers=[1], heads=[1]))
    np.testing.assert_array_equal(one[:, 0, 0], whole[:, 1, 1])
