"""What tests of hostile files share: a refusal in one line, both ways to load, a zip file anew."""

import io
import time
import zipfile

import pytest
import torch

from ad.agent import load_for_acting, load_for_analysis
from ad.checkpoints import load_checkpoint
from config import ActingConfig, VisualizeConfig
from historylens.common.errors import UserError


def refusal(path, read=load_checkpoint) -> str:
    """The line with which a file is refused, in little time."""
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        read(path)
    said = str(caught.value)
    assert time.process_time() - started < 5
    assert said.isprintable()
    assert str(path) in said
    assert len(said) < 2500
    return said


def acting(path):
    return load_for_acting(ActingConfig(checkpoint=str(path)), torch.device("cpu"))


def shown(path):
    return load_for_analysis(VisualizeConfig(checkpoint=str(path)), torch.device("cpu"))


def zipped(path, change, **options):
    """Write a zip file anew after a change of its members."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in change(members).items():
            archive.writestr(name, data)
    return path
