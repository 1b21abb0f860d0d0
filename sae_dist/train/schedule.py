"""The learning rate as a pure function of the step."""

from sae_dist.train.config import TrainConfig


def base_lr(n_latents: int) -> float:
    """lr = 2e-4 / sqrt(n_latents / 2^14): wider dictionaries want smaller steps (Gao et al. 2024, App. A.3)."""
    return 2e-4 / (n_latents / 2**14) ** 0.5


def lr_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay at the end (Templeton et al. 2024); steps count from 0.

    The first step has 1 / warm-up steps of the peak and the last 1 / decay steps, so no step has a rate of 0.
    """
    warmup = round(config.warmup_fraction * config.n_steps)
    decay = round(config.decay_fraction * config.n_steps)
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    if step >= config.n_steps - decay:
        factor = min(factor, (config.n_steps - step) / decay)
    return factor
