"""From stored images to training batches; all randomness is a pure function of the position."""
