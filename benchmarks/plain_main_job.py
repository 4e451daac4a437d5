"""The main job done the plain way, to be measured beside ours: plain_main_job.py CHECKPOINT OUT.

Full attention maps through `need_weights`, the model run again for every layer, seaborn heatmaps at
300 dpi with a tight layout, one figure after another.
"""

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from setting import eager_weights

from ad.checkpoints import HISTORIES_NAME, load_checkpoint
from ad.decisions import HistoryDecisions, choose_decisions
from dataset import Histories
from historylens.history import History


def save(figure: plt.Figure, path: Path) -> None:
    """Laid out and cropped while it is written."""
    figure.tight_layout()
    figure.savefig(path, dpi=300, bbox_inches="tight")
    plt.close(figure)


@torch.no_grad()
def main() -> None:
    """Ten samples, every layer: a heatmap a head, the query's row, the mean of the columns."""
    path, out = map(Path, sys.argv[1:])
    model = load_checkpoint(path).model
    histories = Histories.load(path.parent / HISTORIES_NAME)
    places = choose_decisions(histories, model.n_context_max, 10, seed=0)
    decisions = HistoryDecisions(histories, places, model.n_context_max)
    for number in range(model.config.tf_n_layer):
        folder, values = out / f"layer_{number}", []
        folder.mkdir(parents=True, exist_ok=True)
        for i, decision in enumerate(decisions):
            tokens = model.embed(*History.of([decision]).inputs)
            mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            weights = eager_weights(model.transformer_encoder, tokens, mask)
            maps = next(itertools.islice(weights, number, None))[0].numpy()  # (H, T, T)
            context = maps.mean(axis=0)[-1, :-1]
            quarter = max(1, len(context) // 4)
            entropy = -(context * np.log(context + 1e-10)).sum()
            ratio = context[-quarter:].mean() / (context[:quarter].mean() + 1e-10)
            values.append([context.mean(), context.std(), entropy, ratio])
            figure, panels = plt.subplots(1, len(maps), figsize=(6 * len(maps), 5), squeeze=False)
            for head, panel in enumerate(panels.flat):
                sns.heatmap(maps[head], ax=panel, cmap="viridis", cbar=True)
                panel.set(title=f"Head {head}", xlabel="key", ylabel="query")
            save(figure, folder / f"attention_heatmap_sample{i}_layer{number}.png")
            figure, panels = plt.subplots(1, 2, figsize=(14, 5))
            for panel, rows in zip(panels, (maps[:, -1, :-1], maps.mean(axis=1)), strict=True):
                panel.plot(rows.T, label=[f"Head {head}" for head in range(len(maps))])
                panel.legend()
            save(figure, folder / f"attention_lines_sample{i}_layer{number}.png")
        figure, panels = plt.subplots(2, 2, figsize=(12, 10))
        for panel, column in zip(panels.flat, np.transpose(values), strict=True):
            sns.histplot(column, ax=panel)
        save(figure, folder / f"attention_summary_layer{number}.png")


if __name__ == "__main__":
    main()
