"""Settings, flags, files of them, README and docs say the same; mistakes are one line."""

import argparse
import dataclasses
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import (
    DEFAULTS_OF,
    ActingConfig,
    EnvConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    VisualizeConfig,
)
from historylens.common import settings
from historylens.common.errors import UserError, run_command
from historylens.common.settings import add_flags, flag_of, from_dict
from historylens.comparison import CompareConfig
from historylens.compression.method import METHODS

CONFIGS = (TrainConfig, SourceConfig, EnvConfig, ModelConfig)
NO_FLAGS = {"dim_states", "num_actions"}  # of Dark Room: in files alone


def make_parser(*configs):
    parser = argparse.ArgumentParser(prog="command")
    add_flags(parser, *configs)
    return parser


def settings_of(config):
    return [field for field in dataclasses.fields(config) if field.name not in NO_FLAGS]


@pytest.mark.parametrize("config", CONFIGS)
@given(data=st.data())
def test_flags_parse_back_to_the_settings_they_came_from(config, data):
    draws = {int: st.integers(2, 10**9), float: st.floats(0, 1)}  # what every setting takes
    fields = settings_of(config)
    drawn = {field.name: draws.get(type(field.default), st.just(field.default)) for field in fields}
    if config is ModelConfig:
        drawn["tf_n_head"] = st.just(1)  # of whole heads, whatever the width
    wanted = config(**data.draw(st.fixed_dictionaries(drawn)))
    given = [name for name in drawn if getattr(wanted, name) is not None]
    argv = [f"{flag_of(name)}={getattr(wanted, name)}" for name in given]
    found = from_dict(config, vars(make_parser(config).parse_args(argv)))
    assert found == wanted
    assert [*map(type, vars(found).values())] == [*map(type, vars(wanted).values())]


@pytest.mark.parametrize(("config", "values", "message"), [
    (EnvConfig, {"horizon": 0}, "expected --horizon of at least 1, got 0"),
    (SourceConfig, {"discount": 1.5}, "expected --discount between 0 and 1, got 1.5"),
    (SourceConfig, {"epsilon_end": -0.1}, "expected --epsilon-end between 0 and 1, got -0.1"),
    (ModelConfig, {"tf_n_embd": 10}, "multiple of --tf-n-head, got 10 and 4"),
    (ModelConfig, {"dim_states": 3}, "expected dim_states 2, a row and a column, got 3"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(config, values, message):
    with pytest.raises(UserError, match=message):
        config(**values)


def test_a_setting_of_two_configs_is_one_flag_for_both_and_none_can_be_changed():
    flags = make_parser(*CONFIGS).parse_args(["--grid-size", "7"])
    for config in CONFIGS:  # so settings of one name have one default
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config(), dataclasses.fields(config)[0].name, 1)
        changed = {"grid_size": 7} if hasattr(config, "grid_size") else {}
        assert from_dict(config, vars(flags)) == config(**changed)


def test_help_shows_every_setting_with_its_default_and_no_other():
    shown = " ".join(make_parser(*CONFIGS).format_help().split())
    for field in (field for config in CONFIGS for field in settings_of(config)):
        kind = int if field.default is None else type(field.default)
        choices = "{" + ",".join(field.metadata.get("choices", ())) + "}"
        metavar = {int: "N", float: "X"}.get(kind) or field.metadata.get("metavar", choices)
        text = f"{flag_of(field.name)} {metavar} {field.metadata['help']}"
        default = "" if field.default is None else f" (default: {field.default})"
        assert text + default in shown
    assert not any(f"{flag_of(name)} " in shown for name in NO_FLAGS)


def test_a_flat_dict_of_all_settings_gives_each_config_back_and_may_lack_some():
    wanted = (TrainConfig(lr=0.5), SourceConfig(n_streams=3), EnvConfig(grid_size=7))
    flat = settings.to_dict(*wanted)
    assert (flat["lr"], flat["n_streams"], flat["env"]) == (0.5, 3, "darkroom")
    assert tuple(from_dict(type(config), flat) for config in wanted) == wanted
    assert from_dict(EnvConfig, {"horizon": 5, "alg": "PPO"}) == EnvConfig(horizon=5)


def test_an_interruption_is_code_130_and_a_bug_is_a_line_and_a_file(capsys):
    main, told = Mock(side_effect=[KeyboardInterrupt, KeyError("layers")]), []
    for code in (130, 1):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            run_command(main)
        told.append(capsys.readouterr().err)
    assert told[0] == "interrupted\n"
    assert told[1].startswith("unexpected: KeyError: 'layers'; details in ")
    details = Path(told[1].split()[-1])
    assert "Traceback" in details.read_text()
    details.unlink()


def test_defaults_are_those_of_the_task_however_it_is_named():
    argvs = ["--env", "key-to-door"], ["--env=key-to-door"], ["--en", "key-to-door"]
    for argv in (*argvs, [], ["--env"], ["--seed", "1", "--env", "chess"]):
        asked = settings.given_for("env", argv)
        assert asked == ("key-to-door" if argv in argvs else asked)
        assert DEFAULTS_OF.get(asked, {}).get("n_transit") == (200 if argv in argvs else None)


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
