"""The learning rate as a pure function of the step."""

from sae_dist.train.config import TrainConfig

LONG_STEPS = 50_000  # from which on the rate does not depend on the number of steps
MOST_FASTER, MOST_LR = 4.0, 5e-3


def base_lr(n_latents: int, n_steps: int) -> float:
    """The peak where none is given: 2e-4 / sqrt(n_latents / 2^14), times up to 4 for runs of fewer than 50,000 steps.

    Wider dictionaries want smaller steps (Gao et al. 2024, App. A.3), and few steps have to be large ones: the factor
    is sqrt(50,000 / n_steps). No rate is above 5e-3. docs/quality.md has what was measured.
    """
    faster = min(max((LONG_STEPS / n_steps) ** 0.5, 1.0), MOST_FASTER)
    return min(faster * 2e-4 / (n_latents / 2**14) ** 0.5, MOST_LR)


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
