"""Interventions: what a model says when latents are clamped, and which latents made it say something."""
