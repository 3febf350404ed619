"""The report of a run: one self-contained page, its drawings, and the PCA picture of patches."""
