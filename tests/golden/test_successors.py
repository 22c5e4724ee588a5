"""What came after DanceGRPO: windows, second-order steps, Guard, DPPO, NFT, AWM and DGPO, by hand and against peers."""

from __future__ import annotations

import math

import pytest
import torch

from align.config import load_config
from align.diffusion.kernels import second_order, step_table, transition
from align.diffusion.schedules import compressed, flow_schedule, shifted_sigmas, window_at
from align.errors import ConfigError, KernelError
from trainers.forward_objectives import (
    awm,
    dgpo,
    dgpo_group_weight,
    matching_error,
    nft,
    old_policy_decay,
    optimality,
    supervised,
    x0_estimate,
)
from trainers.objectives import LOSSES, Steps, flow_dppo, gaussian_kl, grpo_guard, grpo_guard_delta


def flow(steps: int, shift: float = 3.0):
    sigmas = shifted_sigmas(steps, shift)
    return flow_schedule(sigmas, sigmas[:-1] * 1000)


# Windows


def test_windows_by_hand():
    def starts(move, steps, **options):
        return [window_at(i, 10, 4, move=move, every=2, **options).start for i in steps]

    assert starts("fixed", (1, 50), first=3) == [3, 3]
    assert starts("progressive", range(1, 14)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert starts("progressive", range(1, 8), stride=2, first=1) == [1, 1, 3, 3, 5, 5, 5]
    assert window_at(99, 10, 4, move="progressive", every=2) == range(5, 9)  # the last step, 9, is never in it


def test_exp_decay_hurries_beyond_half_the_schedule():
    """25 steps, 25 a place: exp(-.1 (l - 13)) of them at place l beyond 13."""
    starts = [window_at(i, 25, 4, move="exp_decay", every=25).start for i in range(1, 500)]
    stays = [starts.count(place) for place in range(20)]
    assert stays[:14] == [25] * 14
    assert stays[14:18] == [round(25 * math.exp(-0.1 * k)) for k in (1, 2, 3, 4)]


def test_random_windows_cover_every_place_and_depend_on_the_step_alone():
    starts = [window_at(i, 10, 3, move="random", every=1, seed=7).start for i in range(1, 400)]
    assert set(starts) == set(range(7))
    assert starts[10] == window_at(11, 10, 3, move="random", every=99, seed=7).start
    assert starts != [window_at(i, 10, 3, move="random", every=1, seed=8).start for i in range(1, 400)]


@pytest.mark.parametrize(("size", "first"), [(10, 0), (4, 6), (0, 0)])
def test_windows_that_do_not_fit(size, first):
    with pytest.raises(KernelError, match="does not fit"):
        window_at(1, 10, size, move="fixed", every=1, first=first)


def test_only_the_window_is_stochastic():
    table = step_table("dance_sde", 0.3, flow(10), stochastic=range(2, 5))
    plain, all_of_them = step_table("ode", 0.0, flow(10)), step_table("dance_sde", 0.3, flow(10))
    assert table.stochastic_steps == [2, 3, 4]
    for s in range(10):
        other = all_of_them if s in (2, 3, 4) else plain
        assert all(float(getattr(table, n)[s]) == float(getattr(other, n)[s]) for n in ("mean_x", "mean_v", "std"))
    assert step_table("dance_sde", 0.3, flow(10), stochastic=range(7, 10)).stochastic_steps == [7, 8]


def test_compression_keeps_the_ends_and_the_levels_before():
    whole, short = flow(10), compressed(flow(10), 4, 0.4)
    assert len(short) == 4 + 3  # ceil(.4 x 6)
    assert torch.equal(short.sigma[:5], whole.sigma[:5]) and float(short.sigma[-1]) == 0
    torch.testing.assert_close(short.sigma[5:7], whole.sigma[[6, 8]])
    torch.testing.assert_close(short.timestep, (short.sigma[:-1] * 1000).float())
    assert torch.equal(compressed(flow(10), 4, 1.0).sigma, whole.sigma)


# Second order


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_second_order_is_diffusers_dpm_solver(shift):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero", lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double()
    table = step_table("ode", 0.0, flow_schedule(sigmas, scheduler.timesteps))
    x = theirs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = None
    for s in range(8):
        velocity = torch.sin(3 * x + s)
        their_velocity = torch.sin(3 * theirs + s)
        theirs = scheduler.step(their_velocity, scheduler.timesteps[s], theirs).prev_sample
        x0_hat = transition(x, velocity, table, s).x0_hat
        x, before = second_order(x, x0_hat, before, table, s), (x0_hat, s)
        torch.testing.assert_close(x, theirs.double(), atol=2e-5, rtol=1e-5)


def test_second_order_falls_back_to_the_ode():
    table = step_table("ode", 0.0, flow(6))
    x, v = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for step, before in ((0, None), (3, None), (5, (torch.randn(2, 5, dtype=torch.float64), 4))):
        moved = transition(x, v, table, step)
        torch.testing.assert_close(second_order(x, moved.x0_hat, before, table, step), moved.x_next)


def test_second_order_converges_faster_than_euler():
    """dx/dt for data N(.7, .5^2): the exact end is known in closed form."""

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        x0 = 0.7 + 0.25 * (1 - sigma) * (x - (1 - sigma) * 0.7) / variance
        return (x - x0) / sigma

    def end(steps, second):
        table, x, before = step_table("ode", 0.0, flow(steps, 1.0)), torch.tensor([[1.3]], dtype=torch.float64), None
        for s in range(steps):
            moved = transition(x, velocity(x, float(table.sigma[s])), table, s)
            x = second_order(x, moved.x0_hat, before, table, s) if second else moved.x_next
            before = (moved.x0_hat, s)
        return float(x)

    exact = 0.7 + 0.5 * 1.3
    for steps in (20, 40):
        assert abs(end(steps, True) - exact) < abs(end(steps, False) - exact) / 3


# Guard and DPPO


def steps_of(noise, shift, std=0.3, advantage=1.0, delta=0.1, threshold=1e-6, clip=1e-4):
    noise, shift = torch.tensor([noise], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64)
    mean_old = torch.zeros_like(shift)
    mean = (mean_old + shift).requires_grad_(True)
    x_next, s = mean_old + std * noise, torch.tensor([std], dtype=torch.float64)
    logp = ((-((x_next - mean) ** 2)) / (2 * std**2)).mean(1)
    logp_old = ((-((x_next - mean_old) ** 2)) / (2 * std**2)).mean(1)
    a = torch.tensor([advantage], dtype=torch.float64)
    return Steps(logp, logp_old.detach(), a, mean, mean_old, x_next, s, torch.tensor([delta]), clip, clip, threshold)


def test_guard_oracle():
    """S = .3, dm = (.02, -.01, .03, 0), e = (1, -.5, .2, 2): log rho .0238889, bias .00194444, guarded .00775."""
    steps = steps_of([1, -0.5, 0.2, 2], [0.02, -0.01, 0.03, 0])
    assert (steps.logp - steps.logp_old).item() == pytest.approx(0.0238889, abs=1e-7)
    assert steps.kl.item() == pytest.approx(0.00194444, abs=1e-8)
    assert grpo_guard(steps).stats["ratio"].item() == pytest.approx(math.exp(0.00775), abs=1e-9)
    divided = grpo_guard_delta(steps_of([1, -0.5, 0.2, 2], [0.02, -0.01, 0.03, 0], delta=0.25))
    assert divided.loss.item() == pytest.approx(4 * grpo_guard(steps).loss.item())


def test_guarded_log_ratio_has_mean_zero():
    """Over the noise the log-ratio of the clip has mean -kl, that of guard 0: within four standard errors."""
    noise = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    std, shift = 0.3, 0.02
    one = torch.ones(len(noise), dtype=torch.float64)
    logp = [-((std * noise - moved) ** 2).mean(1) / (2 * std**2) for moved in (shift, 0.0)]
    mean_old = torch.zeros_like(noise)
    steps = Steps(*logp, one, mean_old + shift, mean_old, std * noise, std * one, one, 1e-4, 1e-4, 1e-6)
    plain, guarded = (LOSSES[name].terms(steps).stats["ratio"].log() for name in ("clip", "guard"))
    error = 4 * float(guarded.std()) / math.sqrt(len(noise))
    assert abs(float(guarded.mean())) < error < shift**2 / (2 * std**2) * std
    assert float(plain.mean()) == pytest.approx(-(shift**2) / (2 * std**2), abs=error / std)


@pytest.mark.parametrize(
    ("noise", "advantage", "threshold", "kept"),
    [([1.0, 1.0], 1.0, 1e-6, False), ([1.0, 1.0], -1.0, 1e-6, True), ([-1.0, -1.0], -1.0, 1e-6, False),
     ([-1.0, -1.0], 1.0, 1e-6, True), ([1.0, 1.0], 1.0, 1.0, True)],
)  # fmt: skip
def test_dppo_drops_what_has_gone_far_the_wanted_way(noise, advantage, threshold, kept):
    steps = steps_of(noise, [0.02, 0.02], advantage=advantage, threshold=threshold)
    terms = flow_dppo(steps)
    ratio = float((steps.logp.detach() - steps.logp_old).exp())
    assert terms.loss.item() == pytest.approx(-advantage * ratio if kept else 0.0)
    terms.loss.sum().backward()
    assert bool(steps.mean.grad.any()) == kept


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_starts_as_the_policy_gradient(name):
    """Where nothing has moved, d loss / d mean is -A (x_next - mean) / (std^2 D), times std for Guard's."""
    steps = steps_of([1.0, -0.5, 0.2, 2.0], [0.0] * 4, advantage=1.7, delta=1.0)
    LOSSES[name].terms(steps).loss.sum().backward()
    scale = 0.3 if name.startswith("guard") else 1.0
    expected = -1.7 * torch.tensor([[1.0, -0.5, 0.2, 2.0]], dtype=torch.float64) / 0.3 / 4 * scale
    torch.testing.assert_close(steps.mean.grad, expected)


@pytest.mark.parametrize(
    ("recipe", "excess", "weight"),
    [("repo_flux", 0.098, 2.7), ("repo_flux_lora", 0.069, None), ("paper", 0.166, None), ("repo_qwen_image", 0.128, None),
     ("repo_wan", 0.128, None), ("repo_hunyuan_video", 0.034, 3.7), ("repo_skyreels", 0.030, 4.6)],
)  # fmt: skip
def test_excess_noise_and_gradient_weight_of_the_last_trained_step(recipe, excess, weight):
    """Noise after it over sigma_next, less 1; and its |d mean / d v| / std over that of the first step."""
    rest = {"model": {"path": "m"}, "prompts": {"path": "p.txt"}, "rewards": [{"name": "a"}]}
    sampler = load_config({"extends": f"presets/{recipe}", **rest}).sampler
    table = step_table(sampler.kernel, sampler.eta, flow(sampler.solver_steps, sampler.shift))
    kept = table.mean_x - 1 + table.sigma_next
    total = (kept**2 + table.std**2).sqrt() / table.sigma_next
    assert float(total[-2]) - 1 == pytest.approx(excess, abs=5.1e-4)
    relative = (table.mean_v / table.std).abs()
    assert weight is None or float(relative[-2] / relative[0]) == pytest.approx(weight, abs=0.05)


def test_the_kl_weight_of_flow_grpo_is_that_of_the_true_std():
    """The release weighs a KL of std^2 / delta by .04: by std^2 that is .04 times delta, averaged over its ten steps."""
    rest = {"model": {"path": "m"}, "prompts": {"path": "p.txt"}, "rewards": [{"name": "a"}]}
    config = load_config({"extends": "presets/flow_grpo", **rest})
    table = step_table(config.sampler.kernel, config.sampler.eta, flow(config.sampler.solver_steps))
    delta = (table.sigma - table.sigma_next)[:-1]
    ones = torch.ones(len(delta), 1, dtype=torch.float64)
    ours = gaussian_kl(ones, 0 * ones, table.mean_v[:-1], table.std[:-1])
    theirs = gaussian_kl(ones, 0 * ones, table.mean_v[:-1], table.std[:-1] / delta.sqrt())
    # Steps alike, or weighed by how far the mean moves with the output.
    alike, weighed = 0.04 * float((theirs / ours).mean()), 0.04 * float(theirs.mean() / ours.mean())
    assert alike < config.objective.kl_weight < weighed < 2 * alike


# Forward process: x0 = .5, noise = -.2, t = .6, v_old = -.4, v = -.5, b = .5, A_max = 5; x = .08


def scalar(value):
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize(("advantage", "loss"), [(2.5, 1.65), (0.0, 1.80), (-5.0, 2.10)])
def test_nft_oracle(advantage, loss):
    x, a, b = scalar(0.08), scalar(1.0), scalar(-0.6)
    new, old = x0_estimate(x, scalar(-0.5), a, b), x0_estimate(x, scalar(-0.4), a, b)
    r = optimality(torch.tensor([advantage], dtype=torch.float64), 5.0, "advantage")
    assert nft(new, old, scalar(0.5), r, beta=0.5, largest=5.0).loss.item() == pytest.approx(loss)


@pytest.mark.parametrize(("advantage", "gradient"), [(2.5, 3.0), (-5.0, -6.0), (0.0, 0.0)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_gradient_at_the_old_policy(advantage, gradient, beta):
    """d loss / d v = clip(A) 2 (-t) (x0_hat - x0) / w, whatever beta: w = |x0_hat - x0| makes it sign x 1.2 A."""
    v = scalar(-0.4).requires_grad_(True)
    x0_hat = x0_estimate(scalar(0.08), v, scalar(1.0), scalar(-0.6))
    r = optimality(torch.tensor([advantage], dtype=torch.float64), 5.0, "advantage")
    nft(x0_hat, x0_hat.detach(), scalar(0.5), r, beta=beta, largest=5.0).loss.sum().backward()
    assert v.grad.item() == pytest.approx(gradient)


def test_optimality_of_every_feedback():
    advantage = torch.tensor([-7.0, -2.5, 0.0, 2.5])
    assert optimality(advantage, 5.0, "advantage").tolist() == [0.0, 0.25, 0.5, 0.75]
    assert optimality(advantage, 5.0, "sign").tolist() == [0.0, 0.0, 0.5, 1.0]
    assert optimality(advantage, 5.0, "positive").tolist() == [0.5, 0.5, 0.5, 0.75]
    assert optimality(advantage, 5.0, "negative").tolist() == [0.0, 0.25, 0.5, 0.5]
    assert optimality(torch.tensor([-1.0, 1.0, 0.5]), 1.0, "label").tolist() == [0.0, 1.0, 0.75]
    with pytest.raises(ConfigError, match="Unknown feedback"):
        optimality(advantage, 5.0, "thumb")


def test_old_policy_schedules():
    assert [old_policy_decay("ramp", s) for s in (1, 100, 500, 900)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    assert [old_policy_decay("late", s) for s in (1, 75, 95, 400)] == pytest.approx([0.0, 0.0, 0.15, 0.999])
    assert old_policy_decay("step", 10) == 0.0


@pytest.mark.parametrize(
    ("weight", "form"),
    [("one", lambda e: e), ("t", lambda e: 0.5 * e), ("t2", lambda e: 0.25 * e), ("huber", lambda e: 0.5 * e**0.5),
     ("ghuber", lambda e: 0.5 * e**0.25 / 0.25)],
)  # fmt: skip
def test_awm_weights(weight, form):
    """t = .5: the ratio is exp(w(e_old) - w(e)), and at the old policy d loss / d e = A w'(e)."""
    error = torch.tensor([0.16], dtype=torch.float64, requires_grad=True)
    sigma, advantage = torch.tensor([0.5], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    terms = awm(error, error.detach(), sigma, advantage, weight, 1e-3)
    assert terms.loss.item() == pytest.approx(-2.0)
    terms.loss.sum().backward()
    slope = (form(0.16 + 1e-6) - form(0.16 - 1e-6)) / 2e-6
    assert error.grad.item() == pytest.approx(2.0 * slope, rel=1e-6)
    moved = awm(torch.tensor([0.25]).double(), torch.tensor([0.16]).double(), sigma, advantage, weight, 0.5)
    assert moved.stats["ratio"].item() == pytest.approx(math.exp(form(0.16) - form(0.25)))


def test_dgpo_weighs_a_group_against_the_reference():
    assert dgpo_group_weight([0.0, 0.0], 50.0, 2) == 0.5
    assert dgpo_group_weight([0.01, -0.03], 50.0, 2) == pytest.approx(1 / (1 + math.exp(0.5)))
    error = torch.tensor([0.2, 0.3], requires_grad=True)
    terms = dgpo(error, torch.tensor([1.0, -1.0]), torch.tensor([0.25, 0.25]))
    assert terms.loss.tolist() == pytest.approx([0.05, -0.075])
    terms.loss.sum().backward()
    assert error.grad.tolist() == [0.25, -0.25]


# Supervised


def test_supervised_by_hand():
    output = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    terms = supervised(matching_error(output, target))
    assert terms.loss.tolist() == [2.5, 5.0]  # (1 + 4) / 2 and (9 + 1) / 2
    assert terms.stats["matching_error"].tolist() == [2.5, 5.0] and not terms.stats["matching_error"].requires_grad
    terms.loss.mean().backward()
    assert output.grad.tolist() == [[0.5, 1.0], [-1.5, -0.5]]  # 2 (output - target) / 2 entries / 2 rows


def test_supervised_is_least_at_the_mean_velocity():
    """Of x0 = 0 or 2 alike and noise 1, at x_t: the least mean loss is that of the mean of noise - x0."""
    targets = torch.tensor([[1.0], [-1.0]])
    losses = [float(supervised(matching_error(torch.full((2, 1), v), targets)).loss.mean()) for v in (-0.5, 0.0, 0.5)]
    assert losses == [1.25, 1.0, 1.25]
