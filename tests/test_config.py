"""Settings, flags and files of them say the same; mistakes are one line."""

import argparse
import dataclasses

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from historylens.common.errors import UserError, run_command
from historylens.common.settings import add_flags, flag_of, from_dict, from_flags, to_dict

CONFIGS = (TrainConfig, SourceConfig, EnvConfig, ModelConfig)
NO_FLAGS = {"env", "dim_states", "num_actions"}  # of Dark Room: in files alone


def make_parser(*configs):
    parser = argparse.ArgumentParser(prog="command")
    add_flags(parser, *configs)
    return parser


def settings_of(config):
    return [field for field in dataclasses.fields(config) if field.name not in NO_FLAGS]


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_settings_are_the_defaults(config):
    assert from_flags(config, make_parser(*CONFIGS).parse_args([])) == config()


# What every setting takes; the width of the model must hold whole heads.
VALUES = {int: st.integers(2, 10**9), float: st.floats(0, 1)}


@pytest.mark.parametrize("config", CONFIGS)
@given(data=st.data())
def test_flags_parse_back_to_the_settings_they_came_from(config, data):
    values = {
        field.name: data.draw(VALUES[type(field.default)], label=field.name)
        for field in settings_of(config)
        if type(field.default) in VALUES and field.name != "tf_n_head"
    }
    wanted = config(**values, **({"tf_n_head": 1} if config is ModelConfig else {}))
    names = [field.name for field in settings_of(config)]
    argv = [f"{flag_of(name)}={getattr(wanted, name)}" for name in names]
    found = from_flags(config, make_parser(config).parse_args(argv))
    assert found == wanted
    assert [type(v) for v in vars(found).values()] == [type(v) for v in vars(wanted).values()]


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (EnvConfig, {"horizon": 0}, "expected --horizon of at least 1, got 0"),
        (SourceConfig, {"discount": 1.5}, "expected --discount between 0 and 1, got 1.5"),
        (SourceConfig, {"epsilon_end": -0.1}, "expected --epsilon-end of at least 0, got -0.1"),
        (TrainConfig, {"max_stride": 0}, "expected --max-stride of at least 1, got 0"),
        (ModelConfig, {"tf_n_embd": 10}, "multiple of --tf-n-head, got 10 and 4"),
        (ModelConfig, {"dim_states": 3}, "expected dim_states 2, a row and a column, got 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, values, message):
    with pytest.raises(UserError, match=message):
        config(**values)


def test_a_setting_of_two_configs_is_one_flag_for_both():
    flags = make_parser(EnvConfig, ModelConfig).parse_args(["--grid-size", "7"])
    assert from_flags(EnvConfig, flags).grid_size == from_flags(ModelConfig, flags).grid_size == 7


def test_settings_of_one_name_have_one_default():
    defaults = {}
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            assert defaults.setdefault(field.name, field.default) == field.default, field.name


def test_help_shows_every_setting_with_its_default_and_no_other():
    shown = " ".join(make_parser(*CONFIGS).format_help().split())
    for config in CONFIGS:
        for field in settings_of(config):
            text = "{metavar} {help}".format(**field.metadata)
            assert f"{flag_of(field.name)} {text} (default: {field.default})" in shown
    assert not any(f"{flag_of(name)} " in shown for name in NO_FLAGS)


@pytest.mark.parametrize(
    "argv", [["--n-updates", "many"], ["--lr"], ["--env", "chess"], ["--batch-size", "1.5"]]
)
def test_a_flag_that_cannot_be_read_ends_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser(*CONFIGS).parse_args(argv)
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, 1)


def test_a_flat_dict_of_all_settings_gives_each_config_back():
    wanted = (TrainConfig(lr=0.5), SourceConfig(n_streams=3), EnvConfig(grid_size=7))
    flat = to_dict(*wanted)
    assert (flat["lr"], flat["n_streams"], flat["env"]) == (0.5, 3, "darkroom")
    assert tuple(from_dict(type(config), flat) for config in wanted) == wanted


def test_settings_missing_from_a_dict_are_the_defaults_and_unknown_ones_are_left():
    assert from_dict(EnvConfig, {"horizon": 5, "alg": "PPO"}) == EnvConfig(horizon=5)


def failing(error):
    def main(argv=None):
        raise error

    return main


def test_a_users_mistake_is_one_line_and_code_2(capsys):
    said = refused(failing(UserError("no goal (9, 9): expected 0..8")), [], capsys)
    assert said == "error: no goal (9, 9): expected 0..8"


def test_an_interruption_ends_with_code_130(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(failing(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_bug_is_not_hidden_and_a_command_that_works_returns():
    with pytest.raises(ZeroDivisionError):
        run_command(failing(ZeroDivisionError()))
    ran = []
    run_command(lambda: ran.append(True))
    assert ran == [True]
