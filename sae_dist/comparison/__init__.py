"""What two dictionaries have in common, how latents of one split in the other, and what the larger one adds."""
