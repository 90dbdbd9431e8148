"""Statistics of the Triton kernels' machine code, without a GPU: instructions, registers, loads, resident blocks."""
