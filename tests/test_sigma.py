"""The posterior that VarShare learns is the known one where one is known: Bayesian linear regression."""

from types import SimpleNamespace

import gymnasium as gym
import probes
import pytest
import torch

varshare = probes.load_script("varshare_ppo.py")
FEATURES, TASKS, SAMPLES, SIGMA_PRIOR = 15, 3, 1024, 0.1
SCALES = torch.logspace(-2, 1, FEATURES)


def squared_error(agent, W, mb, args):
    """0.5 (y - x W)^2, a mean over samples: the negative log-likelihood of noise with variance 1."""
    predicted = varshare.linear(mb.obs, W, "critic.0").squeeze(-1)
    return 0.5 * (predicted - mb.returns).square().mean(1), {"loss": predicted.new_zeros(TASKS)}


def regression(monkeypatch, beta, seed):
    """mu and sigma (task, weight) that `update` ends with on y = x w + noise, and the exact posterior's."""
    monkeypatch.setattr(varshare, "ppo_loss", squared_error)
    rng = torch.Generator().manual_seed(seed)
    size = {"hidden_sizes": (), "envs_per_task": 8, "num_steps": SAMPLES // 8, "update_epochs": 12}
    size |= {"beta": beta, "sigma_prior": SIGMA_PRIOR, "sigma_init": 0.003}
    args = varshare.Args(**size, max_grad_norm=1e9, freeze_theta=True)
    observations = gym.spaces.Box(-1.0, 1.0, (FEATURES,))
    spaces = SimpleNamespace(num_tasks=TASKS, single_observation_space=observations)
    spaces.single_action_space = probes.DISCRETE
    agent = varshare.Agent(spaces, args, rng).requires_grad_(False)
    agent.theta.zero_()
    x = torch.randn(TASKS, SAMPLES, FEATURES, generator=rng) * SCALES
    w = SIGMA_PRIOR * torch.randn(TASKS, FEATURES, 1, generator=rng)
    y = (x @ w).squeeze(2) + torch.randn(TASKS, SAMPLES, generator=rng)
    batch = varshare.Batch(x, y, y, y, y, y)
    optimizer = torch.optim.Adam([agent.mu], lr=0.01)
    for step in range(16):  # 16 times 12 epochs of 4 minibatches
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 16)
        varshare.update(agent, optimizer, batch, varshare.minibatch_gradients, args, rng)
    x = torch.cat((x, torch.ones(TASKS, SAMPLES, 1)), 2)  # the bias
    precision = x.mT @ x / beta + torch.eye(FEATURES + 1) / SIGMA_PRIOR**2
    mu = torch.linalg.solve(precision, x.mT @ y.unsqueeze(2) / beta).squeeze(2)
    sigma = precision.diagonal(dim1=1, dim2=2).rsqrt()  # of the best factorised Gaussian
    critic = slice(-(FEATURES + 1), None)
    return agent, (agent.mu[:, critic], agent.sigma[:, critic]), (mu, sigma)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_sigma_and_mu_are_those_of_a_known_posterior(monkeypatch, beta):
    sigma_error, mu_error = torch.zeros(FEATURES + 1), torch.zeros(FEATURES + 1)
    for seed in range(2):
        agent, (mu, sigma), (true_mu, true_sigma) = regression(monkeypatch, beta, seed)
        sigma_error += ((sigma - true_sigma).abs() / true_sigma).mean(0) / 2
        mu_error += ((mu - true_mu).abs() / (true_mu.abs() + true_sigma)).mean(0) / 2
        actor = slice(0, -(FEATURES + 1))  # which has no part in the loss
        torch.testing.assert_close(agent.sigma[:, actor], torch.full_like(agent.sigma[:, actor], SIGMA_PRIOR))
    assert sigma_error.max() < 0.1, sigma_error
    assert mu_error.max() < 0.1, mu_error
