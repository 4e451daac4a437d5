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


def in_zip(data, change, compression=None):
    """A zip file after `change` of its members, `{name: bytes}`, with right checksums."""
    old, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    kinds = {info.filename: info.compress_type for info in old.infolist()}
    contents = change({name: old.read(name) for name in kinds})
    with zipfile.ZipFile(out, "w") as new:
        for name, content in contents.items():
            kind = kinds.get(name, zipfile.ZIP_STORED) if compression is None else compression
            new.writestr(name, content, kind)
    return out.getvalue()


def zipped(path, change, compression=None):
    """Write a zip file anew after a change of its members."""
    path.write_bytes(in_zip(path.read_bytes(), change, compression))
    return path
