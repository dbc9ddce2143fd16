"""Simulated environments (Gymnasium API)."""
