"""What the latents mean: feature pages, logit effects."""
