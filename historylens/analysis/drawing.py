"""What was found, as pictures, and the page on which they can be browsed.

n_drawn = draw(job, passes, results, None)              # this process's share of the pictures
print(finish(job, results, facts, n_drawn))             # index.html
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from historylens import report
from historylens.analysis.job import Job, Pass, batches, drawn_passes
from historylens.analysis.play import Play, PlayDecisions
from historylens.analysis.results import Results, tables
from historylens.analysis.room import room_maps
from historylens.pictures import (
    INCOMPLETE,
    alone,
    draw_batch,
    draw_play,
    draw_summaries,
    n_pictures,
)
from historylens.pictures.browse import figures_of, write_page
from historylens.pictures.names import pictures_in
from historylens.pictures.painter import Painter, drawing_processes

EACH = {  # kinds of pictures of which there are many
    "heatmap": "a heatmap and a line plot a sample",
    "summary": "a summary a layer",
    "map": "a map a sample",
    "step heatmap": "a rollout step by step",
}


def draw(job: Job, passes: Sequence[Pass], results: Results | None, play: Play | None) -> int:
    """Draw this process's share, and with the results what compares samples; gives how many.

    The passes are run once more: their maps, all at once, would not fit memory.
    """
    config, n_heads, dpi = job.config, [*map(len, job.heads)], {"dpi": job.config.dpi}
    formats = tuple(dict.fromkeys(config.format or ["png"]))
    extra = {} if results is None else alone(results.effects, results.learning, job.agent.title)
    steps = _steps(job, play)
    share = len(job.group.share(job.n_drawn))
    n_own = n_pictures(share, n_heads) + len(extra) + (0 if job.agent.room is None else share)
    if results is not None:
        n_own += len(job.layers) + 1
    if steps is not None:
        n_own += n_pictures(len(job.group.share(len(steps.agent.decisions))), n_heads) + 1
    n_own *= len(formats)
    n_processes = drawing_processes(n_own) if job.group.size == 1 else 1
    kept = f"all numbers are in {job.out / 'metrics.json'}"
    progress = job.progress("pictures", n_own, " pictures")
    with progress as bar, Painter(n_processes, kept, bar.update, formats) as painter:
        for batch in batches(job, passes):
            draw_batch(job.out, batch, painter, room_maps(job, batch), **dpi)
        if results is not None:
            draw_summaries(job.out, results.metrics, painter, **dpi)
        for name, (function, own) in extra.items():
            painter.draw(function, job.out / name, **own, **dpi)
        if steps is not None:
            if results is not None:
                draw_play(steps.out, play, config.trajectory, job.layers, painter, **dpi)
            for batch in batches(steps, drawn_passes(steps, len(steps.agent.decisions))):
                draw_batch(steps.out, batch, painter, name="timestep", every=config.every, **dpi)
    return painter.n_drawn


def _steps(job: Job, play: Play | None) -> Job | None:
    """A job whose decisions are steps of the play that is followed; None: none is."""
    number = job.config.trajectory
    if number is None:
        return None
    agent = copy.copy(job.agent)
    places = [(number, step) for step in range(0, play.rewards.shape[1], job.config.every)]
    agent.decisions = PlayDecisions(play, places)
    return replace(job, agent=agent, out=job.followed)


def finish(job: Job, results: Results, facts: Mapping[str, str], n_drawn: int) -> str:
    """Write the page on which all can be browsed, and say what there is."""
    insights = report.insight_parts(results.insights, results.metrics)
    texts = [block.partition("\n")[::2] for block in tables(results)]
    figures = figures_of(job.out, job.agent.decisions, results.metrics)
    title, is_single = f"Attention of {job.agent.title}", job.config.single_file
    page = write_page(job.out, title, facts, insights, texts, figures, is_single)
    (job.out / INCOMPLETE).unlink()  # fails where the folder is gone
    found = pictures_in(job.out)
    kinds = [text for kind, text in EACH.items() if any(one.kind == kind for one in found)]
    kinds += [one.path.name for one in found if one.sample is None and one.path.parent == job.out]
    drawn = f"{n_drawn} pictures in {job.out}/: {', '.join(kinds)}"
    drawn = drawn if n_drawn else f"No picture could be drawn in {job.out}/"
    return f"{drawn}. All of it on one page: {page}. All numbers: metrics.json, metrics.csv."
