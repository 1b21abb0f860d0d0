"""What a run will need and how fast it will go, worked out before it starts: pure functions of configurations."""
