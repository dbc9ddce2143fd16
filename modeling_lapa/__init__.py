"""The LAPA models."""
