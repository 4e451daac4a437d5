"""README and docs say what is there: strategies, links, flags, files."""

import re
from pathlib import Path

import pytest

from config import ActingConfig, EnvConfig, SourceConfig, TrainConfig, VisualizeConfig
from historylens.common.settings import flag_of
from historylens.comparison import CompareConfig
from historylens.compression.method import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_FLAGS = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
OTHER_FLAGS |= {"--run", "--resume", "--help", "--dim-states"}


def test_the_table_of_strategies_is_that_of_the_registry():
    text = (ROOT / "docs" / "comparing.md").read_text()
    rows = re.findall(
        r"^\| `([\w-]+)`(?: \(new tokens\)|, and so on)? \| (.*?) \| (.*?) \|", text, re.M
    )
    known = {name: method for name, method in METHODS.items() if method.kind != "control"}
    known["head-1-3"] = METHODS["head-1-3"]  # of the ones for any numbers
    assert [name for name, _, _ in rows] == list(known)
    for name, rule, looks_at in rows:
        assert rule == known[name].rule.rstrip(".")
        assert looks_at.replace("the query's", "query") == known[name].looks_at


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_flag_that_is_named_is_one():
    configs = (VisualizeConfig, CompareConfig, ActingConfig, TrainConfig, EnvConfig, SourceConfig)
    flags = {flag_of(name) for config in configs for name in config.__dataclass_fields__}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
        assert named <= flags | OTHER_FLAGS | {"--n-source-steps", "--lr"}, page.name


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 180
