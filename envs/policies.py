"""The distributions of actions that policies are made of.

They are torch.distributions in the few functions that a policy needs. Noise is drawn beforehand: once a
rollout and not once a step, from the run's own generator, and never inside compiled code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def action_noise(discrete: bool, shape: tuple[int, ...], rng: torch.Generator, color: float = 0.0) -> Tensor:
    """Noise of `sample`: for discrete actions Gumbel (its argmax draws from the softmax), else normal.

    With a color b the power of normal noise (step, ...) falls with its frequency as 1 / f^b: it changes more
    slowly (Hollenstein et al., arXiv 2312.11091). At each step alone it is as normal as before. Its mean over
    all steps has the power of the lowest frequency.
    """
    noise = torch.empty(shape, device=rng.device)
    if discrete:
        return -noise.exponential_(generator=rng).log()
    noise.normal_(generator=rng)
    if color:
        waves = torch.arange(shape[0] // 2 + 1, device=rng.device).clamp(min=1)  # of these frequencies
        gain = waves ** (-color / 2)
        gain /= torch.fft.irfft(gain, shape[0]).norm()  # for a variance of 1
        spectrum = torch.fft.rfft(noise.movedim(0, -1)) * gain
        noise = torch.fft.irfft(spectrum, shape[0]).movedim(-1, 0)
    return noise


class Categorical:
    """A softmax over discrete actions, from logits (..., action)."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    @property
    def mean(self) -> Tensor:
        """Probabilities of the actions, (..., action)."""
        return self.logits.softmax(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """Actions (...), from Gumbel noise (..., action)."""
        return (self.logits + noise).argmax(-1)

    def log_prob_entropy(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of actions (...), and the entropy, (...) each."""
        logp = self.logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


class Gaussian:
    """Independent normal distributions of continuous actions, mean and logstd (..., action)."""

    def __init__(self, mean: Tensor, logstd: Tensor):
        self.mean, self.logstd = mean, logstd

    def sample(self, noise: Tensor) -> Tensor:
        """Actions (..., action), from normal noise of that shape."""
        return self.mean + self.logstd.exp() * noise

    def log_prob_entropy(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of actions (..., action), and the entropy, (...) each."""
        logstd = self.logstd.expand_as(self.mean)
        z = (actions - self.mean) / logstd.exp()
        log_density = -0.5 * z.square() - logstd - LOG_SQRT_2PI
        return log_density.sum(-1), (logstd + LOG_SQRT_2PI + 0.5).sum(-1)


class SquashedGaussian:
    """tanh(u) with independent normal u, as in SAC (Haarnoja et al. 2018, appendix C).

    Args of the constructor: the network's output (..., 2 * action), means and what the log standard
    deviations are made of, from -5 to 2 as CleanRL's.
    """

    def __init__(self, out: Tensor):
        self.loc, logstd = out.chunk(2, -1)
        self.logstd = -5 + 3.5 * (logstd.tanh() + 1)

    @property
    def mean(self) -> Tensor:
        """The action of the mean of u, (..., action)."""
        return self.loc.tanh()

    def sample(self, noise: Tensor) -> Tensor:
        """Actions (..., action), from normal noise of that shape."""
        return self.sample_log_prob(noise)[0]

    def sample_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and their log-density (...)."""
        u = self.loc + self.logstd.exp() * noise
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # of tanh(u)
        log_density = -0.5 * noise.square() - self.logstd - LOG_SQRT_2PI - log_slope
        return u.tanh(), log_density.sum(-1)
