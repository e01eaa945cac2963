"""The flow-matching Euler sampler of the demo."""

from __future__ import annotations

import pytest
import torch
from wan_parallel.wanvideo.example.sampling import euler, flow_sigmas


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    assert len(sigmas) == steps + 1 and sigmas.dtype == torch.float64
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_a_shift_of_one_leaves_even_steps():
    assert torch.allclose(flow_sigmas(4, 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64))


def test_a_shift_follows_the_formula_of_sd3():
    assert torch.allclose(flow_sigmas(2, 5.0)[1], torch.tensor(5 * 0.5 / (1 + 4 * 0.5), dtype=torch.float64))
    assert (flow_sigmas(30, 8.0)[1:-1] > flow_sigmas(30, 3.0)[1:-1]).all()


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_euler_is_exact_where_noise_and_video_lie_on_a_line(steps):
    noise, video = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 3, 4, 4)
    found = euler(lambda x, sigma: noise - video, noise, flow_sigmas(steps, 5.0))
    assert torch.allclose(found, video, atol=1e-5)


def test_euler_converges_on_a_curved_path():
    start = torch.tensor([1.0], dtype=torch.float64)  # dx/dsigma = x, so x(0) = 1/e
    errors = [
        abs(float(euler(lambda x, sigma: x, start, flow_sigmas(steps, 1.0))) - 1 / torch.e) for steps in (50, 100)
    ]
    assert errors[1] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order


def test_each_step_is_given_its_own_sigma_and_reported_once():
    sigmas, asked, reported = flow_sigmas(3, 5.0), [], []

    def velocity(x, sigma):
        asked.append(sigma)
        return torch.ones_like(x)

    x = euler(velocity, torch.zeros(1), sigmas, on_step=lambda i, x: reported.append((i, float(x))))
    assert asked == sigmas[:-1].tolist()
    assert [i for i, _ in reported] == [0, 1, 2]
    assert reported[-1][1] == float(x) == pytest.approx(-1.0)


def test_no_steps_leave_the_latent_alone():
    x = torch.randn(3)
    assert torch.equal(euler(lambda x, sigma: 1 / 0, x, torch.tensor([1.0])), x)
