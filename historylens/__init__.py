"""Which history an in-context reinforcement learner uses, and how much of it can go.

    from historylens import capture, Decision, Tokens

`capture` records the attention of any PyTorch model; `Decision` and `Tokens` are what an adapter
gives (`historylens --adapter my_model.py`); `compress_history` shortens one history.
"""

import historylens.common  # noqa: F401 - first: Ctrl-C while all else loads
from historylens.capture import CaptureError, capture, record_attention
from historylens.compression import compress_history
from historylens.history import Decision, History
from historylens.tokens import Tokens

__all__ = ["CaptureError", "Decision", "History", "Tokens"]
__all__ += ["capture", "compress_history", "record_attention"]
