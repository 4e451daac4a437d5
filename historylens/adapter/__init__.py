"""Bring your own model: a Python file says how to run it, and its model is an `Agent`."""
