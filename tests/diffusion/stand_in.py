"""Networks of a few operations, the same in both frameworks, and schedulers with tables in float64."""
import numpy as np


def denoise(library):
    """`denoise(x, t)` in numpy, jax.numpy or torch: elementwise, bounded, different at every step."""
    def call(x, t):
        t = t.reshape((-1,) + (1,) * (x.ndim - 1)) if getattr(t, "ndim", 0) else t
        return 0.8 * library.tanh(1.1 * x - 0.2) + 0.1 * library.sin(x * 0.5 + t * 0.01)
    return call


def give_tables(scheduler, tables):
    """Puts float64 tables into one of diffusers' schedulers, whose own float32 ones differ by more than a step does."""
    import torch
    scheduler.alphas_cumprod = torch.from_numpy(tables.alpha_bar.copy())
    scheduler.betas = torch.from_numpy(tables.betas.copy())
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, torch.tensor(1.0) if scheduler.config.get("set_alpha_to_one", True) else scheduler.alphas_cumprod[0])
    if hasattr(scheduler, "lambda_t"):
        scheduler.lambda_t = 0.5 * torch.log(scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))
    return scheduler


def start(shape=(2, 5, 3, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apart(ours, theirs):
    """max |a - b| / max |b|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
