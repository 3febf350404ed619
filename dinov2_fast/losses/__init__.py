"""The objective: image-level and patch-level cross-entropy, KoLeo, and the teacher's targets."""
