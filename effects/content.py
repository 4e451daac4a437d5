"""Measured effects as plain values: their part of `metrics.json`, and what the picture draws.

content["effects"] = effects_json(effects) | {"faithfulness": faithfulness_json(found)}
figures.deletion_curves("deletion_curves.png", **picture(content["effects"]))
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from compression import get_strategy
from effects.faithfulness import Faithfulness, mean_defined
from effects.measure import DRAWN, N_DRAWS, UNMOVED_EMPTY, WORST, Effects, budgets
from effects.outcomes import BAND, UNMOVED, Outcome, against_random, enough


def effects_json(effects: Effects) -> dict[str, Any]:
    """Everything that was measured, and every number of the picture, as plain values."""
    advising = {
        name: [pattern for pattern, names in effects.advised.items() if name in names]
        for name in [*effects.curves, *effects.own_size]
    }
    strategies = {}
    for name, outcomes in effects.curves.items():
        sizes = [
            outcome_json(one, None if name == "random" else against_random(one, random))
            for one, random in zip(outcomes, effects.curves["random"], strict=True)
        ]
        strategies[name] = {"sizes": sizes, "enough": enough(outcomes)}
    for name, (own, random) in effects.own_size.items():
        sizes = [outcome_json(own, against_random(own, random)) | {"random": outcome_json(random)}]
        strategies[name] = {"sizes": sizes}
    for name, entry in strategies.items():
        chosen = get_strategy(name)
        about = {"rule": chosen.rule, "looks_at": chosen.looks_at, "advised_by": advising[name]}
        strategies[name] = about | {"n_draws": DRAWN.get(name, 1)} | entry
    return {
        "settings": {
            "samples": list(effects.samples),
            "n_context": effects.n,
            "budgets": list(budgets(effects.n)),
            "n_random_draws": N_DRAWS,
            "band_percentiles": list(BAND),
            "seed": effects.seed,
            "unmoved_nats": UNMOVED,
            "unmoved_empty_nats": UNMOVED_EMPTY,
        },
        "definitions": {
            "flips": "share of decisions whose most likely action changes",
            "kl": "KL(full || compressed) of the action distributions, nats",
            "band": "percentiles of the draws, each a mean over decisions",
            "against_random": "mean KL below (better) or above (worse) that of every draw",
            "enough": "fewest transitions from which on the mean KL stays within unmoved_nats",
        },
        "ignores_history": effects.ignores_history,
        "controls": {name: outcome_json(one) for name, one in effects.controls.items()},
        "not_run": dict(effects.not_run),
        "strategies": strategies,
    }


def outcome_json(outcome: Outcome, against: str | None = None) -> dict[str, Any]:
    """One outcome; with the band over draws where there are several."""
    found = {
        "n_keep": outcome.n_keep,
        "kept_mean": outcome.kept_mean,
        "kept_min": int(outcome.kept.min()),
        "kept_max": int(outcome.kept.max()),
        "n_decisions": outcome.kl.shape[1],
        "flips": outcome.flip_share,
        "kl_mean": outcome.kl_mean,
        "kl_p95": outcome.kl_p95,
    }
    if len(outcome.kl) > 1:
        found |= {"flips_band": list(outcome.band("flips")), "kl_band": list(outcome.band("kl"))}
    return found | ({} if against is None else {"against_random": against})


def faithfulness_json(found: Faithfulness | None) -> dict[str, Any] | None:
    """Correlations as plain values; what is not defined is null."""
    if found is None:
        return None
    layers = zip(found.layers, found.head_numbers, found.heads, found.layer_means, strict=True)
    return {
        "note": "Spearman correlation of the query's attention with the KL, in nats, that leaving "
        "out each transition causes; over transitions, null where either is constant",
        "samples": list(found.samples),
        "overall": _plain(found.overall),
        "recency": _plain(float(mean_defined(found.recency))),
        "layers": [
            {
                "layer": layer,
                "head_numbers": list(numbers),
                "head_average": _plain(float(mean_defined(means))),
                "heads": _plain(mean_defined(heads)),
                "head_average_per_sample": _plain(means),
                "heads_per_sample": _plain(heads),
            }
            for layer, numbers, heads, means in layers
        ],
        "overall_per_sample": _plain(found.means),
        "recency_per_sample": _plain(found.recency),
        "leave_one_out": {"kl": found.kl.tolist(), "flips": found.flips.mean(axis=1).tolist()},
    }


def _plain(values: np.ndarray | float) -> Any:
    """Nested lists of floats, None for NaN."""
    if isinstance(values, np.ndarray):
        return [_plain(value) for value in values]
    return float(values) if np.isfinite(values) else None


def picture(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `attention.figures.deletion_curves` draws of `effects_json(...)`."""
    return {
        "strategies": content["strategies"],
        "empty": content["controls"].get("empty"),
        "n_context": content["settings"]["n_context"],
        "worst": WORST,
    }
