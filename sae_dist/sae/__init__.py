"""The mathematics of sparse autoencoders: no ranks, no clocks."""
