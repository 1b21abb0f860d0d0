"""Labels of latents: who gives them, and how good they are on contexts that the labeller has not seen."""
