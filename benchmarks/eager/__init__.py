"""The iBOT-style eager reference step: what the claim of speed and memory is measured against.

Plain modules under autograd, no op of ours: one forward pass a resolution, attention weights
stored, masked drop path, heads on every token, softmax centering, one probability tensor a term.
Parameter names are the package's, so both start from the same weights. Installed as
`dinov2_fast.bench.eager`.
"""
