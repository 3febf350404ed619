"""Whole steps measured against the eager reference: `dinov2-fast bench`."""
