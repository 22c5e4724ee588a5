"""Diffusion and rectified-flow models: kernels, schedules, rollouts and one adapter per family."""
