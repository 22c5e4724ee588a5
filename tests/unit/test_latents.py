"""Pixels to latents and back, with a trained autoencoder."""

from __future__ import annotations

import torch

from align.diffusion.digits import build_digits
from align.diffusion.digits_data import load_split
from align.diffusion.latents import autoencoder_key, pixel_size
from align.diffusion.policy import Policy, load_family


def test_decoding_gives_the_image_back():
    """The autoencoder of a half-trained model has seen other digits; what is left is its own error."""
    policy = Policy(load_family(build_digits("smoke", progress=False)))
    images = load_split("evaluator").images[:64].expand(-1, 3, -1, -1)
    latents = policy.to_latents(images)
    assert latents.shape[1:] == policy.latent_shape and pixel_size(policy) == (16, 16)
    assert 0.9 < float(latents.std()) < 1.1 and abs(float(latents.mean())) < 0.1
    error = (policy.decode(latents) - images).square().mean().sqrt()
    assert float(error) < 0.1 < float((images - images.mean()).square().mean().sqrt())
    turned = (policy.decode(policy.to_latents(1 - images)) - images).square().mean().sqrt()
    assert float(turned) > 4 * float(error)


def test_a_latent_is_one_autoencoders():
    policy = Policy(load_family(build_digits("smoke", progress=False)))
    key = autoencoder_key(policy)
    with torch.no_grad():
        policy.family.pipeline.vae.encoder.conv_in.bias[0] += 1e-6
    assert autoencoder_key(policy) != key
