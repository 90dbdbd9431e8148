"""The machine code of the Triton kernels, measured without a GPU: instructions, registers, loads, resident blocks."""
