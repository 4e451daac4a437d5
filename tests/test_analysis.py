"""One batched pass over decisions: maps of those alone that are drawn."""

import torch
from conftest import ad_agent

from historylens.analysis import AnalysisConfig
from historylens.analysis.job import Job, batches
from historylens.common.processes import ALONE


def test_the_last_row_of_a_map_is_the_querys_and_only_what_is_drawn_has_maps(
    tiny_model, tiny_histories
):
    agent = ad_agent(tiny_model, tiny_histories, [(0, 12, 1), (2, 29, 1), (1, 28, 2)])
    job = Job.of(agent, AnalysisConfig(num_figures=0, layers=[1]), ALONE)
    drawn, rest = batches(job, [([0, 1], [0, 1]), ([2], [])])
    assert list(drawn.attention) == list(rest.attention) == [1]
    layer = drawn.attention[1]
    assert layer.maps.shape == (2, 2, 12, 12)
    torch.testing.assert_close(layer.maps[:, :, -1], layer.query_rows)
    assert rest.attention[1].maps is rest.attention[1].received is None
