"""Numbers in, pictures out: the five kinds of picture of an attention analysis, written as PNG.

    heatmap(path, layer.maps[0], layer.map_rows, layer.map_cols, sample, layer=2)
    lines(path, layer.query_rows[0], layer.received[0], uniform_received(T), sample, layer=2)
    curve_lines(path, shown.query, shown.received, sample, layer=2)   # several tokens a transition
    summary(path, {"entropy": values, ...}, {"entropy": 5.4, ...}, layer=2)        # values (B,)
    layers(path, {"entropy": values, ...}, {"entropy": 5.4, ...}, numbers=[0, 1])  # (L, B)
    deletion_curves(path, strategies, empty, n_context=99)

What is drawn comes in as arrays, from torch or numpy; here it only finds its place. The same arrays
give the same file, byte for byte. Axes: `B` samples, `H` heads, `L` layers, `T` tokens.
"""

from attention.curveplot import deletion_curves
from attention.heatmap import heatmap
from attention.lineplot import curve_lines, lines
from attention.metricplot import layers, summary

__all__ = ["curve_lines", "deletion_curves", "heatmap", "layers", "lines", "summary"]
