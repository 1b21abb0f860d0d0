"""One dictionary trained by many processes: a mesh of a data and a feature axis, and the step that works on it."""
