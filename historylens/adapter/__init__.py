"""Bring your own model: `python visualize_attention.py --adapter my_model.py`.

A user's file imports what it needs from here:

    from adapter import Decision, Tokens
"""

from adapter.file import Adapter, Decision, History, Tokens, load_adapter

__all__ = ["Adapter", "Decision", "History", "Tokens", "load_adapter"]
