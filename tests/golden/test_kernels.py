"""Transition kernels against hand-computed numbers, closed forms and diffusers' own Euler step."""

from __future__ import annotations

import math

import pytest
import torch

from align.diffusion.kernels import KERNELS, coefficients, gaussian_logp, step_table, transition
from align.diffusion.schedules import Schedule, flow_schedule, shifted_sigmas
from align.errors import KernelError

FLOW = [kind for kind in KERNELS if kind != "ddim"]
STOCHASTIC = [kind for kind in FLOW if kind != "ode"]
ETA = {"ode": 0.0, "dance_sde": 0.3, "flow_sde": 0.7, "cps": 0.8, "precise": 1.5, "dance_precise": 0.3}

# x = .5, v = -.3, sigma .75 -> .6, x_next = .4: noise_coef, std, mean, logp, d mean / d v
ORACLE = {
    "dance_sde": (0.591, 0.1161895, 0.541175, 0.4954320, -0.15225),
    "flow_sde": (0.453, 0.4695743, 0.482525, -0.1784528, -0.18675),
    "cps": (0.1854102, 0.5706339, 0.3687993, -0.3594259, -0.2536475),
    "precise": (0.2751012, 0.5332160, 0.4069180, -0.2901940, -0.2312247),
    "dance_precise": (0.5910672, 0.1031485, 0.5412035, 0.4156560, -0.1522332),
}


def table_of(kind: str, sigmas: torch.Tensor, eta: float | None = None):
    return step_table(kind, ETA[kind] if eta is None else eta, flow_schedule(sigmas, sigmas[:-1] * 1000))


def scalar_step(kind: str, dtype: torch.dtype = torch.float64):
    table = table_of(kind, torch.tensor([0.75, 0.6, 0.0], dtype=torch.float64))
    x = torch.full((1, 1), 0.5, dtype=dtype)
    v = torch.full((1, 1), -0.3, dtype=dtype, requires_grad=True)
    return table, x, v


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_scalar_oracle(kind):
    noise_coef, std, mean, logp, jacobian = ORACLE[kind]
    assert coefficients(kind, 0.75, 0.6, ETA[kind]) == pytest.approx((noise_coef, std), abs=1e-7)
    table, x, v = scalar_step(kind)
    moved = transition(x, v, table, 0, x_next=torch.full_like(x, 0.4), reduction="mean")
    assert moved.x0_hat.item() == pytest.approx(0.725)
    assert moved.mean.item() == pytest.approx(mean, abs=1e-7)
    assert moved.logp.item() == pytest.approx(logp, abs=1e-6)
    moved.mean.sum().backward()
    assert v.grad.item() == pytest.approx(jacobian, abs=1e-6)
    assert table.mean_v[0].item() == pytest.approx(jacobian, abs=1e-6)


def test_ode_has_no_density():
    table, x, v = scalar_step("ode")
    assert transition(x, v, table, 0).mean.item() == pytest.approx(0.545)
    with pytest.raises(KernelError, match="no log-probability"):
        transition(x, v, table, 0, x_next=x, reduction="mean")


def test_flow_and_retention_oracles():
    c, _ = coefficients("precise", 0.9, 0.8, 0.7)
    assert c / 0.8 == pytest.approx(0.8198, abs=5e-5)
    em, _ = coefficients("flow_sde", 0.9, 0.8, 0.7)
    assert em / 0.8 == pytest.approx(0.69375, abs=1e-9)


SCHEDULE = [1, 0.964286, 0.923077, 0.875, 0.818182, 0.75, 0.666667, 0.5625, 0.428571, 0.25, 0]
STD = {
    "flow_sde": [0.700, 0.738, 0.532, 0.441, 0.388, 0.350, 0.320, 0.290, 0.256],
    "dance_sde": [0.057, 0.061, 0.066, 0.072, 0.078, 0.087, 0.097, 0.110, 0.127],
    "cps": [0.917, 0.878, 0.832, 0.778, 0.713, 0.634, 0.535, 0.408, 0.238],
    "precise": [0.964, 0.845, 0.733, 0.649, 0.580, 0.516, 0.446, 0.359, 0.229],
}
LAST_STD = {"flow_sde": 0.202, "dance_sde": 0.150, "cps": 0.0, "precise": 0.0}
TOTAL_NOISE = {
    "flow_sde": [1.041, 1.059, 1.025, 1.019, 1.018, 1.023, 1.034, 1.068, 1.237],
    "dance_sde": [1.000, None, None, None, None, None, None, 1.008, 1.055],
    "cps": [1.0] * 9,
    "precise": [1.0] * 9,
    "dance_precise": [1.0] * 9,
}


def test_shifted_schedule():
    assert shifted_sigmas(10, 3.0).tolist() == pytest.approx(SCHEDULE, abs=5e-7)


@pytest.mark.parametrize("kind", STD)
def test_std_along_the_schedule(kind):
    sigmas = shifted_sigmas(10, 3.0)
    table = table_of(kind, sigmas)
    assert table.std[:-1].tolist() == pytest.approx(STD[kind], abs=5.1e-4)
    assert coefficients(kind, 0.25, 0.0, ETA[kind])[1] == pytest.approx(LAST_STD[kind], abs=5.1e-4)
    assert table.std[-1] == 0 and table.stochastic_steps == list(range(9))


@pytest.mark.parametrize("kind", TOTAL_NOISE)
def test_total_noise_along_the_schedule(kind):
    table = table_of(kind, shifted_sigmas(10, 3.0))
    kept = table.mean_x - 1 + table.sigma_next
    total = ((kept**2 + table.std**2).sqrt() / table.sigma_next)[:-1].tolist()
    for measured, expected in zip(total, TOTAL_NOISE[kind], strict=True):
        assert expected is None or measured == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize(
    ("kind", "first", "last", "last_step"),
    [("flow_sde", 0.051, 1.54, 9), ("dance_sde", 0.63, 1.89, 9), ("cps", 0.039, 1.17, 8), ("precise", 0.037, 1.15, 8)],
)
def test_gradient_weight(kind, first, last, last_step):
    """|d mean / d v| / std of the raw kernel; the exact kinds have no density on the very last step."""
    levels = shifted_sigmas(10, 3.0).tolist()

    def weight(s: int) -> float:
        noise_coef, std = coefficients(kind, levels[s], levels[s + 1], ETA[kind])
        return abs(-levels[s] * (1 - levels[s + 1]) + (1 - levels[s]) * noise_coef) / std

    assert weight(0) == pytest.approx(first, abs=5.1e-3)
    assert weight(last_step) == pytest.approx(last, abs=5.1e-3)


@pytest.mark.parametrize("kind", ["dance_sde", "flow_sde"])
def test_t1_euler_maruyama_closed_forms(kind):
    """mean = x - delta v + g^2 delta score / 2 with score = -noise_hat / sigma, in float32."""
    generator = torch.Generator().manual_seed(0)
    sigmas = shifted_sigmas(10, 3.0)
    table = table_of(kind, sigmas)
    for s in range(9):
        x, v = (torch.randn(4, 3, generator=generator) for _ in range(2))
        sigma, delta = float(sigmas[s]), float(sigmas[s] - sigmas[s + 1])
        g2 = float(table.std[s]) ** 2 / delta
        x0 = x - sigma * v
        score = -(x - (1 - sigma) * x0) / sigma**2
        torch.testing.assert_close(score, -(x + (1 - sigma) * v) / sigma, atol=2e-6, rtol=1e-5)
        moved = transition(x, v, table, s, noise=torch.zeros_like(x))
        torch.testing.assert_close(moved.mean, x - delta * v + 0.5 * g2 * delta * score, atol=1e-6, rtol=1e-5)
        closed = x * (1 - g2 * delta / (2 * sigma)) - v * (1 + g2 * (1 - sigma) / (2 * sigma)) * delta
        torch.testing.assert_close(moved.mean, closed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", FLOW)
def test_t2_eta_zero_is_euler_bit_for_bit(kind):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    table = step_table(kind, 0.0, flow_schedule(scheduler.sigmas, scheduler.timesteps))
    x = theirs = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    for s, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(s))
        x = transition(x, v, table, s).x_next
        theirs = scheduler.step(v, t, theirs, return_dict=False)[0]
        if kind in ("ode", "dance_sde", "flow_sde", "cps"):
            assert torch.equal(x, theirs)
        else:
            torch.testing.assert_close(x, theirs, atol=2e-6, rtol=1e-6)


def marginal_std(kind: str, eta: float, steps: int = 400, flip: bool = False) -> tuple[float, float]:
    """Mean and std of x0 for a N(.7, .5^2) target, by the exact linear recursion of the kernel's step."""
    m, s0 = 0.7, 0.5
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    table = table_of(kind, sigmas, eta)
    mean, var = 0.0, 1.0
    for i in range(steps):
        s = float(sigmas[i])
        total = (1 - s) ** 2 * s0**2 + s**2
        # v(x) = E[noise - x0 | x] is linear in x: v = slope (x - (1 - s) m) - m
        slope = (s - (1 - s) * s0**2) / total
        correction = float(table.mean_x[i] - 1) * (-1 if flip else 1)
        delta = s - float(sigmas[i + 1])
        a = 1 - delta * slope + correction * (1 + (1 - s) * slope)
        b = (-delta + correction * (1 - s)) * (-slope * (1 - s) * m - m)
        mean, var = a * mean + b, a * a * var + float(table.std[i]) ** 2
    return mean, math.sqrt(var)


@pytest.mark.parametrize(
    ("kind", "eta", "std"),
    [("ode", 0, 0.4982), ("dance_sde", 0.3, 0.4984), ("dance_sde", 1.0, 0.4999), ("flow_sde", 0.7, 0.5011),
     ("precise", 1.5, 0.4953), ("dance_precise", 0.3, 0.4970), ("dance_precise", 1.0, 0.4810), ("cps", 0.8, 0.4010)],
)  # fmt: skip
def test_t3_gaussian_marginal(kind, eta, std):
    mean, measured = marginal_std(kind, eta)
    assert mean == pytest.approx(0.7, abs=1e-9)
    assert measured == pytest.approx(std, abs=6e-5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_t3_marginal_is_preserved_and_a_flipped_sign_is_not(eta):
    assert abs(marginal_std("dance_sde", eta)[1] / 0.5 - 1) < 0.02
    assert abs(marginal_std("dance_sde", 1.0, flip=True)[1] / 0.5 - 1) > 1


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_t5_log_prob_and_its_gradient(kind, reduction):
    table = table_of(kind, shifted_sigmas(6, 3.0))
    generator = torch.Generator().manual_seed(2)
    x, v, x_next = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    v.requires_grad_(True)
    step = torch.tensor([0, 2, 4])
    moved = transition(x, v, table, step, x_next=x_next, reduction=reduction)
    std = table.std[step].reshape(-1, 1, 1)
    reference = torch.distributions.Normal(moved.mean, std.expand_as(moved.mean)).log_prob(x_next).flatten(1)
    torch.testing.assert_close(moved.logp, reference.mean(1) if reduction == "mean" else reference.sum(1))
    moved.logp.sum().backward()
    expected = (x_next - moved.mean) / std**2 * table.mean_v[step].reshape(-1, 1, 1)
    torch.testing.assert_close(v.grad, (expected / (8 if reduction == "mean" else 1)).detach())


@pytest.mark.parametrize("kind", FLOW)
def test_t6_the_last_step_decodes_x0_and_ignores_noise(kind):
    table = table_of(kind, shifted_sigmas(8, 3.0))
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    calm = transition(x, v, table, 7, noise=torch.zeros(2, 3))
    wild = transition(x, v, table, 7, noise=torch.full((2, 3), 50.0))
    assert torch.equal(calm.x_next, wild.x_next) and calm.x_next.isfinite().all()
    torch.testing.assert_close(calm.x_next, calm.x0_hat)
    assert 7 not in table.stochastic_steps


def test_samples_of_one_call_may_stand_at_different_steps():
    table = table_of("dance_sde", shifted_sigmas(8, 3.0))
    x, v, x_next = torch.randn(5, 3, 2), torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    steps = torch.tensor([4, 0, 6, 2, 2])
    together = transition(x, v, table, steps, x_next=x_next, reduction="mean")
    for i, s in enumerate(steps.tolist()):
        alone = transition(x[i : i + 1], v[i : i + 1], table, s, x_next=x_next[i : i + 1], reduction="mean")
        assert torch.equal(alone.logp, together.logp[i : i + 1])


def test_bad_input_is_named():
    sigmas = shifted_sigmas(4, 1.0)
    table = table_of("dance_sde", sigmas)
    x = torch.zeros(1, 2)
    with pytest.raises(KernelError, match="dance_sde"):
        coefficients("dance_sd", 0.5, 0.4, 0.3)
    with pytest.raises(KernelError, match="must descend"):
        coefficients("dance_sde", 0.4, 0.5, 0.3)
    with pytest.raises(KernelError, match="out of range"):
        coefficients("dance_sde", 0.5, 0.4, -0.3)
    with pytest.raises(KernelError, match="end at sigma = 0"):
        flow_schedule(sigmas[:-1], sigmas[:-2])
    with pytest.raises(KernelError, match="float32"):
        transition(x.bfloat16(), x.bfloat16(), table, 0, noise=x)
    with pytest.raises(KernelError, match="lost precision"):
        transition(x, x, table, 0, x_next=x.bfloat16(), reduction="mean")
    with pytest.raises(KernelError, match="needs its noise"):
        transition(x, x, table, 0)
    with pytest.raises(KernelError, match="not both"):
        transition(x, x, table, 0, noise=x, x_next=x)
    with pytest.raises(KernelError, match="reduction"):
        gaussian_logp(x, x, torch.ones(1), "max")


def vp_schedule(prediction: str, steps: int = 8):
    alpha_bar = torch.linspace(0.02, 0.999, steps + 1, dtype=torch.float64)
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.arange(steps, 0, -1).float(), prediction)


def test_t4_ddim_oracle_is_the_ddpm_posterior():
    """alpha-bar .5 -> .6, eta 1, x .5, predicted noise .2, worked against the posterior of the forward process."""
    alpha_bar = torch.tensor([0.5, 0.6, 1.0], dtype=torch.float64)
    schedule = Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.tensor([2.0, 1.0]), "epsilon")
    table = step_table("ddim", 1.0, schedule)
    moved = transition(
        torch.full((1, 1), 0.5, dtype=torch.float64),
        torch.full((1, 1), 0.2, dtype=torch.float64),
        table,
        0,
        noise=torch.zeros(1, 1),
    )
    assert (moved.std.item(), moved.x0_hat.item(), moved.mean.item()) == pytest.approx(
        (0.3651484, 0.5071068, 0.4960828), abs=1e-6
    )
    a, a2 = 0.5, 0.6
    beta = 1 - a / a2
    posterior = (a2**0.5 * beta * moved.x0_hat.item() + (a / a2) ** 0.5 * (1 - a2) * 0.5) / (1 - a)
    assert moved.mean.item() == pytest.approx(posterior, abs=1e-9)
    assert moved.std.item() ** 2 == pytest.approx((1 - a2) / (1 - a) * beta, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_t4_ddim_equals_diffusers(eta, prediction):
    from diffusers import DDIMScheduler

    from align.diffusion.schedules import ddim_schedule

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(10)
    table = step_table("ddim", eta, ddim_schedule(scheduler, 10))
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    x = theirs = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    for s, t in enumerate(scheduler.timesteps):
        v, noise = (torch.randn(x.shape, generator=torch.Generator().manual_seed(10 * s + k)) for k in (0, 1))
        last = s == 9
        x = transition(theirs, v, table, s, noise=noise).x_next
        theirs = scheduler.step(
            v, t, theirs, eta=0.0 if last else eta, variance_noise=None if last else noise, return_dict=False
        )[0]
        torch.testing.assert_close(x, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_t4_the_prediction_types_describe_one_transition(prediction):
    """A v-prediction model that says the same of x0 and noise as an epsilon model takes the same step."""
    schedule = vp_schedule(prediction)
    table = step_table("ddim", 0.7, schedule)
    x0, noise = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    alpha, sigma = schedule.alpha[:8, None], schedule.sigma[:8, None]
    x = alpha * x0 + sigma * noise
    output = noise if prediction == "epsilon" else alpha * noise - sigma * x0
    moved = transition(x, output, table, torch.arange(8), noise=torch.zeros_like(x))
    torch.testing.assert_close(moved.x0_hat, x0)
    kept = (schedule.sigma[1:, None] ** 2 - moved.std[:, None] ** 2).clamp(min=0).sqrt()
    torch.testing.assert_close(moved.mean, schedule.alpha[1:, None] * x0 + kept * noise)


def test_t4_ddim_keeps_the_marginal_and_its_gradient_is_mean_v():
    table = step_table("ddim", 1.0, vp_schedule("epsilon"))
    x, x_next = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0, 3, 6])
    moved = transition(x, v, table, step, x_next=x_next, reduction="mean")
    moved.logp.sum().backward()
    torch.testing.assert_close(
        v.grad, ((x_next - moved.mean) / table.std[step, None] ** 2 * table.mean_v[step, None] / 5).detach()
    )
    assert table.std[-1] == 0 and 7 not in table.stochastic_steps


def test_kernels_know_their_path():
    with pytest.raises(KernelError, match="Set sampler.kernel to ddim"):
        step_table("dance_sde", 0.3, vp_schedule("epsilon"))
    sigmas = shifted_sigmas(4, 1.0)
    with pytest.raises(KernelError, match="flow kernel"):
        step_table("ddim", 1.0, flow_schedule(sigmas, sigmas[:-1]))
    with pytest.raises(KernelError, match="eta is out of range"):
        coefficients("ddim", 0.5, 0.4, 1.5)
    with pytest.raises(KernelError, match="v_prediction"):
        step_table(
            "ddim",
            1.0,
            Schedule(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.0]), "epsilon"),
        )
