"""Compressed against full history in an environment: arms, statistics, verdicts, reports."""
