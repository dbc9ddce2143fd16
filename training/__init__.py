"""Trainers of the three stages."""
