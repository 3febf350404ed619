"""What is known of every Triton kernel without a GPU: registers, spills, memory, machine code."""
