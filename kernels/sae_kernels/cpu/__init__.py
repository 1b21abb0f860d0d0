"""The operations on a CPU with AVX2 or AVX-512 BF16: C++ called by ctypes, compiled at first use."""
