import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import (
    EnvConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    add_flags,
    from_dict,
    from_flags,
    run_command,
    to_dict,
)

CONFIGS = (TrainConfig, SourceConfig, EnvConfig, ModelConfig)


def make_parser(*configs):
    parser = argparse.ArgumentParser(prog="command", formatter_class=argparse.HelpFormatter)
    add_flags(parser, *configs)
    return parser


def flag(name):
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_settings_are_the_defaults(config):
    assert from_flags(config, make_parser(*CONFIGS).parse_args([])) == config()


# What every setting takes; the width of the model must hold whole heads.
VALUES = {int: st.integers(2, 10**9), float: st.floats(0, 1)}
FIXED = {"dim_states": 2, "tf_n_head": 1}


@pytest.mark.parametrize("config", CONFIGS)
@given(data=st.data())
def test_flags_parse_back_to_the_settings_they_came_from(config, data):
    values = {
        field.name: data.draw(VALUES[type(field.default)], label=field.name)
        for field in dataclasses.fields(config)
        if type(field.default) in VALUES and field.name not in FIXED
    } | {
        field.name: FIXED[field.name] for field in dataclasses.fields(config) if field.name in FIXED
    }
    wanted = config(**values)
    argv = [f"{flag(name)}={value}" for name, value in vars(wanted).items()]
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
        (ModelConfig, {"dim_states": 3}, "expected --dim-states 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, values, message):
    with pytest.raises(UserError, match=message):
        config(**values)


def test_a_setting_of_two_configs_is_one_flag_for_both():
    flags = make_parser(EnvConfig, ModelConfig).parse_args(["--grid-size", "7"])
    assert from_flags(EnvConfig, flags).grid_size == 7
    assert from_flags(ModelConfig, flags).grid_size == 7


def test_settings_of_one_name_have_one_default():
    defaults = {}
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            assert defaults.setdefault(field.name, field.default) == field.default, field.name


def test_help_shows_every_setting_with_its_default():
    shown = " ".join(make_parser(*CONFIGS).format_help().split())
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            value = field.metadata.get("metavar") or "{darkroom}"
            text = f"{flag(field.name)} {value} {field.metadata['help']} (default: {field.default})"
            assert text in shown


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
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), name, 1)


def test_a_flat_dict_of_all_settings_gives_each_config_back():
    wanted = (TrainConfig(lr=0.5), SourceConfig(n_streams=3), EnvConfig(grid_size=7))
    flat = to_dict(*wanted)
    assert flat["lr"] == 0.5
    assert flat["n_streams"] == 3
    assert tuple(from_dict(type(config), flat) for config in wanted) == wanted


def test_settings_missing_from_a_dict_are_the_defaults_and_unknown_ones_are_left():
    assert from_dict(EnvConfig, {"horizon": 5, "alg": "PPO"}) == EnvConfig(horizon=5)


def failing(error):
    def main():
        raise error

    return main


def test_a_users_mistake_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(failing(UserError("no goal (9, 9): expected 0..8")))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: no goal (9, 9): expected 0..8\n")


def test_an_interruption_ends_with_code_130(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(failing(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(failing(ZeroDivisionError()))


def test_a_command_that_works_returns():
    ran = []
    run_command(lambda: ran.append(True))
    assert ran == [True]


def test_a_real_process_shows_no_traceback():
    code = (
        "from config import UserError, run_command\n"
        "def main():\n    raise UserError('expected this, got that')\n"
        "run_command(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: expected this, got that\n"
