"""Scaling Monosemanticity (Templeton et al. 2024) again, by one command: `make paper-2024`."""
