"""Tests; they mirror the package file by file."""
