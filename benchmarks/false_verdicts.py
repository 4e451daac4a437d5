"""How often a study says what is not true: simulated scores through the real race and the verdicts.

    python benchmarks/false_verdicts.py                     # 1,000 studies of each setting
    python benchmarks/false_verdicts.py --studies 100 --sizes 4,18

An arm that loses the margin or more and is called safe or better is a false verdict; one that
loses no more than it and is stopped is a false stop. Where arms collapse, a share of their runs
earns as little as can be: on average that is the margin, whatever else they earn. A single arm is
one to be confirmed: it is judged at each look.
"""

import numpy as np
from setting import print_table, read_flags

from historylens.comparison.intervals import GOOD, judged, looks, shown_worse

N_GOALS, MARGIN, FULL = 8, 0.05, 12.0  # a share of what full history earns, an episode
SETTINGS = {  # share of the arms that lose, how many margins, and the noise
    "none loses": (0.0, 1, "normal"),
    "all lose it": (1.0, 1, "normal"),
    "half lose it": (0.5, 1, "normal"),
    "half lose eight times it": (0.5, 8, "normal"),
    "all lose it, skewed noise": (1.0, 1, "skewed"),
    "all lose it by collapses": (1.0, 1, "collapses"),
    "half lose it by collapses": (0.5, 1, "collapses"),
    "all lose it by costly collapses": (1.0, 1, "costly"),
    "all lose it by collapses on one goal": (1.0, 1, "one goal"),
}
LEVELS = FULL + np.linspace(-4, 4, N_GOALS)  # of full history, goal by goal
COLLAPSES = {  # levels, what is left of a run that collapses, and on which goals some do
    "collapses": (LEVELS, 0.0, np.full(N_GOALS, True)),
    "costly": (-LEVELS, -5 * FULL, np.full(N_GOALS, True)),
    "one goal": (np.array([7 * FULL, *[FULL / 7] * 7]), 0.0, np.arange(N_GOALS) == 0),
}


def scores_of(
    rng: np.random.Generator, n_arms: int, n_seeds: int, losing: float, lost: int, noise: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of full history `(G, R)` and of arms `(N, G, R)`, and which of these lose `(N,)`."""
    shape, loses = (n_arms, N_GOALS, n_seeds), np.arange(n_arms) < losing * n_arms
    levels, left, where = COLLAPSES.get(noise, COLLAPSES["collapses"])
    sigma = np.minimum(2, abs(levels) / 4)[:, None]
    full = levels[:, None] + sigma * rng.normal(size=shape[1:])
    if noise in COLLAPSES:
        often = MARGIN * abs(levels.mean()) / ((levels - left) * where).mean()
        fails = loses[:, None, None] & where[:, None] & (rng.random(shape) < often)
        return full, np.where(fails, left, full + 0.1 * sigma * rng.normal(size=shape)), loses
    drawn = rng.normal(size=shape) if noise == "normal" else 1 - rng.exponential(size=shape)
    return full, full - lost * MARGIN * FULL * loses[:, None, None] + 2 * drawn, loses


def rates(n_studies: int, n_seeds: int, n_arms: int, *setting: object) -> np.ndarray:
    """Shares `(4,)`: studies with a false verdict, false stops of arms, true verdicts, runs saved.

    False stops are of the arms within the margin, true ones, safe or better, of those without loss.
    """
    rng, of = np.random.default_rng(n_seeds), np.zeros((2, 4))
    _, least, _ = COLLAPSES.get(setting[2], COLLAPSES["collapses"])  # as a control shows it
    for _ in range(n_studies):
        full, arms, loses = scores_of(rng, n_arms, n_seeds, *setting)
        going, allowed, n_saved = np.arange(n_arms), ~loses | (setting[1] <= 1), 0
        good, is_one = going[:0], n_arms == 1
        for n, share in looks(n_seeds).items():
            so_far = arms[going][:, :, :n], full[:, :n]
            if n == n_seeds or is_one:
                among = 1 / share if is_one else n_arms
                told = judged(*so_far, MARGIN, among, least=least)
                good = going[np.array([said in GOOD for _, _, said in told], dtype=bool)]
                if is_one and len(good):
                    n_saved += n_seeds - n
                    break
            if n < n_seeds:
                worse = shown_worse(*so_far, MARGIN, share)
                n_saved += (n_seeds - n) * worse.sum()
                going = going[~worse]
        n_stopped = allowed.sum() - allowed[going].sum()
        of[0] += loses[good].any(), n_stopped, (~loses[good]).sum(), n_saved
        of[1] += 1, allowed.sum(), (~loses).sum(), n_arms * n_seeds
    return of[0] / np.maximum(of[1], 1)


if __name__ == "__main__":
    flags = read_flags(__doc__, studies=1000, sizes=["4,18", "16,80", "24,12", "128,1"])
    print(f"{flags.studies:,} studies of {N_GOALS} goals; truly lost: {MARGIN:.0%}, or nothing")
    columns = "seeds | arms | setting | studies with a false safe or better:.2% | arms within the "
    columns += "margin that stopped:.2% | arms without loss called safe or better:.2%"
    sizes = [tuple(map(int, size.split(","))) for size in flags.sizes]
    each = [(size, *setting) for size in sizes for setting in SETTINGS.items()]
    rows = ((*size, name, *rates(flags.studies, *size, *how)) for size, name, how in each)
    print_table(f"{columns} | runs saved:.2%", rows)
