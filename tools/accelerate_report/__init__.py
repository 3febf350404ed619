"""What accelerated blocks would gain on GPUs, modelled: no GPU takes part."""
