"""Online evolution strategies: a meta-gradient from every truncation window, without waiting for a training's end.

Owns when a task's perturbation is drawn anew and which perturbations a window's losses are credited to. Never takes
an inner step.

The objective is the mean meta-loss over the steps of an episode. A window's loss depends on every perturbation since
its episode began; with all of them credited the estimate is unbiased for the steps that the window covers, and the
tasks' staggered windows average to the whole episode. With ``split="outer_valid"`` the objective is the mean, over
the windows' ends, of the loss of the parameters there on fresh validation batches (learned_optimization measures it
after each step, at the price of a second forward pass); an episode that ends inside a window has none there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.base import Theta
from worker.estimators.base import Estimate, EstimatorState, EvolutionStrategy, LossDifference, es_gradient
from worker.particles import Particles
from worker.perturbations import Terms
from worker.unroll import Unroll

VALIDATION_BATCHES = 5
"""Batches behind the validation loss at a window's end."""
FOREVER = 2**62
"""A noise period that no episode outlives."""


class GPES(EvolutionStrategy):
    """Generalised PES: each perturbation serves ``noise_windows`` windows (Li et al. 2023, arXiv:2304.12180, GPES_K).

    K = noise_windows x window inner steps; 1 is PES, a whole episode is NRES, and the variance falls from the one to
    the other. All of an episode's perturbations are summed, each once, into what its losses are credited to. A window
    has one perturbation per task, so an episode that begins amid a window begins with that window's, and its periods
    are counted from the next window on. That costs variance where noise is reused; so episodes then end with a window,
    up to window - 1 steps early (the first of a task, and those shorter than a window, may still end amid one).
    """

    def __init__(
        self,
        unroll: Unroll,
        sigma: float | Tensor,
        *,
        window: int,
        noise_windows: int = 1,
        difference: LossDifference = LossDifference(),  # noqa: B008 - frozen
        split: str = "train",
    ) -> None:
        super().__init__(unroll, sigma, difference, split)
        self.window, self.noise_windows = window, noise_windows

    def init(self) -> EstimatorState:
        """Per task: the sum of its episode's perturbations, and the windows that drew the first and the second one."""
        n = self.unroll.num_tasks
        noise = {
            "accumulator": torch.zeros(n, self.unroll.lopt.spec.trainable_size),
            "first_noise": torch.zeros(n, dtype=torch.int64),
            "next_noise": torch.zeros(n, dtype=torch.int64),
        }
        return self.unroll.start().tensors() | noise | {"windows": torch.tensor(0)}

    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        number = int(state["windows"])
        particles = Particles.from_tensors(state, self.unroll.device)
        if self.noise_windows > 1:
            end_with_windows(particles, self.window)
        anew = self._anew(state["over"])
        first = torch.where(anew, number, state["first_noise"])
        following = torch.where(anew, number, state["next_noise"])
        age = (number - following) % self.noise_windows
        eps, thetas = self._perturb(theta, number - age)
        kept = torch.where(_rows(anew, eps), 0, state["accumulator"].to(eps.device))
        total = kept + torch.where(_rows(age == 0, eps), eps, 0)

        losses, done = self.unroll.run(thetas, particles, self.window, number)
        measured, delta = self._differences(losses, particles, number)
        old, new = credits(delta, done)
        gradient = es_gradient(old.to(eps.device), total, self.sigma) + es_gradient(new.to(eps.device), eps, self.sigma)
        terms = self._terms(number, first, following, old, new)

        ended = done.any(0)
        after = {
            "accumulator": torch.where(_rows(ended, eps), eps, total),
            "first_noise": torch.where(ended, number - age, first),
            "next_noise": torch.where(ended, number + 1, following),
            "windows": torch.tensor(number + 1),
        }
        return Estimate(gradient.cpu(), float(measured.mean()), losses.numel(), terms), particles.tensors() | after

    def _anew(self, over: Tensor) -> Tensor:
        """Which tasks' credit begins with this window: those that begin an episode."""
        return over

    def _differences(self, losses: Tensor, particles: Particles, number: int) -> tuple[Tensor, Tensor]:
        """The meta-losses (W, 2n), or at the window's end (2n,), and what enters the estimate (W, n)."""
        if self.split == "train":
            return losses, self.difference(losses)
        measured = self.unroll.final_losses(particles, number, VALIDATION_BATCHES, self.split)
        delta = torch.zeros(len(losses), self.unroll.num_tasks)
        delta[-1] = len(losses) * self.difference(measured)
        return measured, delta

    def _terms(self, number: int, first: Tensor, following: Tensor, old: Tensor, new: Tensor) -> Terms:
        """The same estimate as seeds and coefficients: each draw of each task's episode, and the newest once more."""
        counts = (number - following) // self.noise_windows + 1
        pair = self.pairs.repeat_interleave(counts)
        place = torch.arange(len(pair)) - (counts.cumsum(0) - counts)[pair]
        begun_amid = first < following
        newest = following + (counts - 1) * self.noise_windows
        window = torch.cat([following[pair] + place * self.noise_windows, first[begun_amid], newest])
        coefficient = torch.cat([old[pair], old[begun_amid], new]) / (2 * len(old))
        pair = torch.cat([pair, self.pairs[begun_amid], self.pairs])
        used = coefficient != 0
        return Terms(window[used], pair[used], coefficient[used])


class PES(GPES):
    """Persistent evolution strategies (Vicol et al. 2021, arXiv:2112.13835, algorithm 2): new noise every window."""


class NRES(GPES):
    """Noise-reuse evolution strategies (Li et al. 2023, arXiv:2304.12180): one noise for a whole episode.

    The least variance of the family where the losses of an episode's steps depend on theta alike.
    """

    def __init__(
        self,
        unroll: Unroll,
        sigma: float | Tensor,
        *,
        window: int,
        difference: LossDifference = LossDifference(),  # noqa: B008 - frozen
        split: str = "train",
    ) -> None:
        super().__init__(unroll, sigma, window=window, noise_windows=FOREVER, difference=difference, split=split)


class TruncatedES(PES):
    """Truncated evolution strategies (Metz et al. 2019, arXiv:1810.10180): PES that forgets; biased.

    A window's losses are credited to that window's perturbation alone, as if the state that it started from did not
    depend on theta. The variance is the smallest and what is estimated is short-sighted.
    """

    def _anew(self, over: Tensor) -> Tensor:
        return torch.ones_like(over)


def credits(delta: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss differences (n,) of the episode that was running and of those that began inside the window.

    delta, done (W, n): differences, and whether the episode ended with that step. Losses up to and including the
    terminating step belong to the old episode (the original credits that step to the newest perturbation alone, which
    biases it); later ones depend on this window's perturbation only.
    """
    begun_inside = (done.cumsum(0) - done.to(torch.int64)) > 0
    return (delta * ~begun_inside).sum(0) / len(delta), (delta * begun_inside).sum(0) / len(delta)


def end_with_windows(particles: Particles, window: int) -> None:
    """Move the ends of the running episodes down to ends of windows, where at least one window is left of them."""
    whole = (particles.ends - particles.inner_step) // window * window
    particles.ends = torch.where(particles.over | (whole == 0), particles.ends, particles.inner_step + whole)


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    """Flags (n,) that choose among the rows of ``like`` (n, D)."""
    return flags.to(like.device).unsqueeze(-1)
