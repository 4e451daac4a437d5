"""What every part shares. Imported first: Ctrl-C ends a command in silence while it loads, and sums
of products are the same with any number of threads, those of few rows by `SteadySums`.
"""

import os
import signal
import sys

_folder, _name = os.path.split(getattr(sys.modules["__main__"], "__file__", None) or "")
_is_ours = _name in ("visualize_attention.py", "compare_compression.py", "train.py")
if _name == "historylens" or (_is_ours and _folder == os.path.abspath(f"{__file__}/../../..")):
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # read when torch is loaded
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _wrong = "" if os.stat(".").st_nlink else "the working folder is gone: change to another one"
    if sys.flags.optimize > 1:
        _wrong = "python -OO (PYTHONOPTIMIZE=2) drops texts that are shown: run without it"
    if _wrong:
        print(f"error: {_wrong}", file=sys.stderr)
        sys.exit(2)
