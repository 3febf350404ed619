"""What is known of every CUDA kernel without a GPU: machine code, execution, modelled time."""
