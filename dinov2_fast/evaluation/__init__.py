"""Evaluation of frozen features: one file for each protocol."""
