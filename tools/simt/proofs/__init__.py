"""Proofs that the interpreter is right; run by tests and by tools.simt.selfcheck."""
