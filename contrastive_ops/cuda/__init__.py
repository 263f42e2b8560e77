"""What happens around the kernels in csrc/cuda: memory, chunks and library products; one module per primitive."""
