"""The arithmetic, one file per op: its reference, its public function and what makes it fast.

Import from the files (`from dinov2_fast.ops.attention import attention`): most functions share
their file's name.
"""
