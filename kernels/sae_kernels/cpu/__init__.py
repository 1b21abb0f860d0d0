"""The operations on a CPU with AVX-512 BF16: C++ behind ctypes, built at first use."""
