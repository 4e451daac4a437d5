"""A command in a process of its own, forked: what it prints, and where a kill ends it."""

import io
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch._dynamo  # noqa: F401

import ad.evaluation  # noqa: F401 - once, and not in each process
import historylens.pictures.returns  # noqa: F401
from historylens.common.errors import run_command

CHANGES = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "open": 0}
TEMPORARY = re.compile(r"\..*\.tmp|\.write-test-\d+")


def started(main, argv, folder, kill_at=None, out="out", err="err", encoding="utf-8"):
    """The number of a process that runs a command in a folder.

    `out` and `err` are files for what it prints, beside the folder, open numbers, or None: closed.
    Of the changes to files in the folder, the `kill_at`-th, from 0, kills it before it is made.
    """
    if pid := os.fork():
        return pid
    os.chdir(folder)
    for number, name in ((1, out), (2, err)):
        if name is None:
            os.close(number)
        else:
            is_open = isinstance(name, int)
            mode = os.O_WRONLY | os.O_CREAT
            os.dup2(name if is_open else os.open(folder.parent / name, mode), number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        closed = (out, err)[number - 1] is None
        stream = None if closed else io.TextIOWrapper(io.FileIO(number, "wb"), encoding)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    changes = []

    def see(event, args):
        if event in CHANGES and is_change(event, args, folder):
            if len(changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(event)

    sys.addaudithook(see)
    code = 0
    try:
        run_command(lambda: main(argv))
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    folder.with_name("changes").write_text(" ".join(changes))
    os._exit(code)


def is_change(event, args, folder):
    """Whether an audited event changes something in the folder, where the process works."""
    path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else "/"
    flags = args[2] if event == "open" else os.O_CREAT
    here = not path.startswith("/") or path.startswith(f"{folder}/")
    return here and bool(flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))


def ended(pid, folder, seconds=60):
    """How a started process ended: its code, what it printed, and the lines that say why."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (folder.with_name("out"), folder.with_name("err"))
    )
    for name in ("out", "err"):
        folder.with_name(name).unlink(missing_ok=True)
    why = re.compile("error|unexpected|interrupted|terminated|hung up")
    told = [line for line in re.split("[\r\n]", err) if why.match(line)]
    assert "Traceback" not in out + err
    return SimpleNamespace(code=code, out=out, err=err, told=told)


def run_apart(main, argv, folder, **options):
    """Start a command, and wait for its end."""
    return ended(started(main, [*map(str, argv)], folder, **options), folder)


def plain_files(folder: Path) -> dict[str, bytes]:
    """Names and contents below a folder: without temporary files, and measured times as zeros."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not TEMPORARY.fullmatch(path.name):
            content = re.sub(rb'("(?:seconds|ms_)\w*": )[\d.e+-]+', rb"\1 0", path.read_bytes())
            if path.name == "results.csv":  # its last two columns
                content = re.sub(rb",[^,\n]*,[^,\n]*\n", b"\n", content)
            files[path.relative_to(folder).as_posix()] = content
    return files


def temporaries(folder: Path) -> list[str]:
    """Names of files that a killed process left half written."""
    return [path.name for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name)]
