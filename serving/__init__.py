"""Running policies."""
