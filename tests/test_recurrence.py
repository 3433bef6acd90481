"""The recurrences' gradients by hand are those of their definitions: alone, under vmap, and second ones."""

import pytest
import torch

from tasks.families.recurrence import GRU, LSTM, RELU

H, S, B = 3, 4, 2
SHAPES = {
    "relu": (RELU, [(S, B, H), (H, H), (B, H)]),
    "gru": (GRU, [(S, B, 2 * H), (S, B, H), (H, 2 * H), (H, H), (B, H)]),
    "lstm": (LSTM, [(S, B, 4 * H), (H, 4 * H), (B, H), (B, H)]),
}
each = pytest.mark.parametrize(("recurrence", "shapes"), SHAPES.values(), ids=SHAPES)


def inputs(shapes, *leading):
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(*leading, *shape, generator=draws, dtype=torch.float64).requires_grad_() for shape in shapes]


@each
def test_states_and_derivatives_are_those_of_the_definition(recurrence, shapes):
    leaves = inputs(shapes)
    expected = recurrence.plain(*(leaf.unsqueeze(0) for leaf in leaves)).squeeze(0)
    torch.testing.assert_close(recurrence(*leaves), expected)
    assert torch.autograd.gradcheck(recurrence, leaves)
    assert torch.autograd.gradgradcheck(recurrence, leaves)


@each
@pytest.mark.parametrize("shared", [(), (1,), (0, 1)], ids=str)
def test_under_vmap_each_particle_has_its_own(recurrence, shapes, shared):
    """Also where some inputs are the same for all particles, and in a vmap of a vmap."""
    leaves = [leaf.detach() for leaf in inputs(shapes, 2, 5)]
    leaves = [leaf[0, 0] if at in shared else leaf for at, leaf in enumerate(leaves)]
    dims = tuple(None if at in shared else 0 for at in range(len(leaves)))
    everything = tuple(range(len(leaves)))

    def loss(*args):
        return recurrence(*args).square().sum()

    found = torch.vmap(torch.vmap(torch.func.grad(loss, everything), dims), dims)(*leaves)
    for i in range(2):
        for j in range(5):
            one = [leaf if at in shared else leaf[i, j] for at, leaf in enumerate(leaves)]
            expected = torch.func.grad(
                lambda *args: recurrence.plain(*(x.unsqueeze(0) for x in args)).square().sum(), everything
            )(*one)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[i, j], theirs)
