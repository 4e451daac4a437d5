"""Bring your own model: a Python file says how to run it, and its model is an `Agent`.

agent = load("my_model.py", n=10, seed=0, device=torch.device("cpu"))       # adapter.agent
"""
