"""What a reader must know about the tokens of one sample, whatever model they come from.

    sample = Sample(index=0, title="goal (2, 7), history 3, step 1240", n_context=100,
                    episode_starts=np.array([0, 20, 40, 60, 80]), rewarded=rewards > 0)

A sample is what one heatmap and one line plot show.
"""

from dataclasses import dataclass, field

import numpy as np

from attention.tokens import Tokens


@dataclass(frozen=True)
class Sample:
    """One decision of the model: `n_context` transitions, then the query.

    Attributes:
        index: number of the sample within a run, the `I` of the file names.
        title: one line that says which decision this is, for the titles of pictures.
        n_context: number of transitions `n`. Where `tokens` is None each is one token, and the
            query token is token `n`.
        episode_starts: `(E,)` int, transitions at which an episode begins, ascending.
        rewarded: `(n,)` bool, context transitions that were rewarded.
        labels: columns that name the sample in tables, for example goal, history and step.
        tokens: what each token is that the model reads; None: a transition each, then the query.
    """

    index: int
    title: str
    n_context: int
    episode_starts: np.ndarray
    rewarded: np.ndarray
    labels: dict[str, int | float | str] = field(default_factory=dict)
    tokens: Tokens | None = None

    def __post_init__(self) -> None:
        if self.rewarded.shape != (self.n_context,):
            raise ValueError(
                f"sample {self.index}: expected rewarded of shape ({self.n_context},), "
                f"got {self.rewarded.shape}"
            )
        if self.episode_starts.size and not (
            self.episode_starts.min() >= 0 and self.episode_starts.max() < self.n_context
        ):
            raise ValueError(
                f"sample {self.index}: episode starts must lie in 0..{self.n_context - 1}, "
                f"got {self.episode_starts.tolist()}"
            )
