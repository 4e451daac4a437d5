"""Attention of any causal transformer: capture it, measure it, draw it, read advice off it."""
