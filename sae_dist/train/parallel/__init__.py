"""Training on many processes: a mesh with a data axis and a feature axis, and the step on it."""
