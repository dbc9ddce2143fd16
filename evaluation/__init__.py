"""Closed-loop evaluation, statistics and the demo."""
