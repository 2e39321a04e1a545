"""Denoising diffusion as pure functions on arrays: schedules, the process, losses, samplers, likelihood. Networks are callables `denoise(x, t)`.

    schedules      betas and the tables made of them (float64, host); EDM's sigmas
    process        q(x_t | x_0), its posterior, eps / x0 / v / EDM's F and conversions, learned variances
    losses         errors and weightings, the bound's terms, the hybrid loss; step_sampling: which t to train at
    plans          which noise levels a sampler visits
    samplers       ancestral, DDIM and inversion, DPM-Solver++; sigma_samplers: Euler, Heun; inpainting: RePaint
    guidance       classifier-free guidance with rescale, static and dynamic thresholding
    noise          random numbers by row and step, interpolation of noise, drawing in batches of one size
    likelihood     bits/dim of the bound and of the probability-flow ODE
    recipe         schedule, prediction and sampler as settings: what configs and published schedulers say
"""
from vlm_jax.diffusion.guidance import classifier_free, dynamic_threshold, static_threshold
from vlm_jax.diffusion.inpainting import repaint
from vlm_jax.diffusion.likelihood import flow_likelihood, variational_bound
from vlm_jax.diffusion.losses import bound_loss, bound_term, edm_loss, hybrid_loss, prediction_loss, weighted
from vlm_jax.diffusion.noise import in_batches, initial_noise, row_keys, row_noise, slerp
from vlm_jax.diffusion.plans import Plan, SigmaPlan, discrete_plan, edm_plan, sigma_plan, solver_plan
from vlm_jax.diffusion.process import convert, q_sample, to_eps, to_x0, training_target
from vlm_jax.diffusion.recipe import Recipe
from vlm_jax.diffusion.samplers import Samples, ancestral, ddim, ddim_invert, dpm_solver, renoised
from vlm_jax.diffusion.schedules import Tables, build_tables, tables, tables_of_alpha_bar, zero_terminal_snr
from vlm_jax.diffusion.sigma_samplers import euler, heun
from vlm_jax.diffusion.step_sampling import StepHistory, sample_steps, step_history, update_history

__all__ = ["Plan", "Recipe", "Samples", "SigmaPlan", "StepHistory", "Tables", "ancestral", "bound_loss", "bound_term", "build_tables", "classifier_free",
           "convert", "ddim", "ddim_invert", "discrete_plan", "dpm_solver", "dynamic_threshold", "edm_loss", "edm_plan", "euler", "flow_likelihood", "heun",
           "hybrid_loss", "in_batches", "initial_noise", "prediction_loss", "q_sample", "renoised", "repaint", "row_keys", "row_noise", "sample_steps",
           "sigma_plan", "slerp", "solver_plan", "static_threshold", "step_history", "tables", "tables_of_alpha_bar", "to_eps", "to_x0", "training_target",
           "update_history", "variational_bound", "weighted", "zero_terminal_snr"]
