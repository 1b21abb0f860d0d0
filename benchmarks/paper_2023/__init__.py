"""Towards Monosemanticity (Bricken et al. 2023) again, by one command: `make paper-2023`."""
