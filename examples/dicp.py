"""Adapter: AD and DPT of https://github.com/jaehyeon-son/dicp (its gridworld/), from your checkout.

    export DICP=~/dicp/gridworld DICP_CHECKPOINT=~/dicp/gridworld/runs/RUN/ckpt-50000.pt
    python visualize_attention.py --adapter examples/dicp.py

Without DICP: dicp/gridworld beside this file. DICP_HISTORIES: the folder of histories, if moved.
Of what the training needs only einops, lightning-utilities, h5py and PyYAML are needed.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from historylens import Decision, History, Tokens


class _SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool, **unused: bool) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.w3 = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def _rotate(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, *_: Tensor) -> None:
    x[:], y[:] = x * cos - y * sin, x * sin + y * cos  # in place, as that code asks for


# Stand-ins for what that code imports and a CPU cannot run; these run everywhere.
kernels = SimpleNamespace(apply_rotary=_rotate, SwiGLU=_SwiGLU)
kernels.dropout_add_ln_fwd = lambda x, _, w, *a: (F.rms_norm(x, w.shape, w, a[6]), *4 * [None])
sys.modules.update(dict.fromkeys(["rotary_emb", "dropout_layer_norm", "xformers.ops"], kernels))
sys.path.insert(0, os.environ.get("DICP", str(Path(__file__).parent / "dicp" / "gridworld")))
CONTENT = torch.load(os.environ["DICP_CHECKPOINT"], map_location="cpu", weights_only=True)
CONFIG = CONTENT["config"] | {"device": "cpu"}  # where the model is built; it is moved later
N_MAX, IS_AD = CONFIG["n_transit"] - 1, CONFIG["model"] == "AD"


def load() -> nn.Module:
    """The model of the checkpoint."""
    from model import MODEL  # of the checkout, as are `dataset` and `env`

    model = MODEL[CONFIG["model"]](CONFIG)
    model.load_state_dict(CONTENT["model"])
    return model


def samples(n: int, seed: int) -> Iterator[Decision]:
    """Decisions of a stream of the source algorithm in each task held out."""
    from dataset import ADDataset

    folder = os.environ.get("DICP_HISTORIES", CONFIG["traj_dir"])
    data = ADDataset(CONFIG, folder, "test", 1, CONFIG["train_source_timesteps"])
    names = ("states", "actions", "rewards", "query_states", "next_states")
    for i in np.random.default_rng(seed).choice(len(data), size=n).tolist():
        task, start = divmod(i, len(data.states[0]) - N_MAX)
        arrays = (data[i][name] for name in names)
        episodes = (start + np.arange(N_MAX)) // CONFIG["horizon"]
        yield Decision(*arrays, episodes, f"held-out task {task}, step {start + N_MAX}", task=task)


def act(model: nn.Module, history: History) -> Tensor:
    """Action logits `(B, A)`, as that code acts with them."""
    query, actions = history.query_states, F.one_hot(history.actions, CONFIG["num_actions"])
    parts = [history.states, actions, history.rewards[..., None], history.next_states]
    x = model.embed_context(torch.cat([part.float() for part in parts], dim=-1))  # (B, n, D)
    if IS_AD:
        cell = query[:, :1] * CONFIG["grid_size"] + query[:, 1:]
        x, head = torch.cat([x, model.embed_query_state(cell.long())], dim=1), model.pred_action
    else:
        cell = F.pad(query[:, None].float(), (0, model.embed_context.in_features - query.shape[1]))
        x, head = torch.cat([model.embed_context(cell), x], dim=1), model.pred_actions
    llama = model.transformer  # its cache of rotations is no buffer, so it does not move along
    llama.rope_cache_fp32 = llama.build_rope_cache(x.device, torch.float32)
    return head(llama(x, N_MAX + 1, dtype="fp32")[:, -1])


def tokens(history: History) -> Tokens:
    """A token a transition, of which AD reads the query behind and DPT before; the last decides."""
    return Tokens.of(history.n, query="last" if IS_AD else "first", decides=-1)
