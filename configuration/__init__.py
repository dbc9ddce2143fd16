"""Configurations of the LAPA models."""
