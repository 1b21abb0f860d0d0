"""The Python interface: what `sae_dist.NAME` gives, a file each kind of thing."""
