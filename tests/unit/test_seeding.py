from __future__ import annotations

import torch

from align.diffusion.rollout import initial_noise, step_noise
from align.diffusion.schedules import trained_subset
from align.seeding import normal, permutation, seed


def test_a_key_is_all_a_draw_depends_on():
    first = normal((3, 4), 7, 2, "init")
    torch.rand(100)
    assert torch.equal(first, normal((3, 4), 7, 2, "init"))
    assert not torch.equal(first, normal((3, 4), 7, 2, "sde"))
    assert seed(1, 2) != seed(12) != seed("1", 2)
    assert 0 <= seed("x") < 2**63


def test_t16_shared_initial_noise():
    shape = (2, 4, 4)
    group = initial_noise(shape, range(12), 4, "group", 0, 1).reshape(3, 4, *shape)
    assert (group == group[:, :1]).all() and not torch.equal(group[0], group[1])
    assert not torch.equal(group[0, 0], initial_noise(shape, [0], 1, "group", 0, 2)[0])
    own = initial_noise(shape, range(12), 4, "none", 0, 1)
    assert len({tuple(x.flatten().tolist()) for x in own}) == 12
    rank = initial_noise(shape, range(12), 4, "rank", 0, 1)
    assert (rank == rank[:1]).all()
    later = initial_noise(shape, range(4, 12), 4, "group", 0, 1)
    assert torch.equal(later, group[1:].reshape(8, *shape))


def test_t16_step_noise_is_independent_for_every_sample_and_step():
    draws = torch.cat([step_noise((8, 8), range(12), 4, s, 0, 1).flatten(1) for s in range(5)])
    correlation = torch.corrcoef(draws) - torch.eye(60)
    assert correlation.abs().max() < 0.6 and draws.std().sub(1).abs() < 0.05
    assert torch.equal(step_noise((8, 8), [5], 4, 2, 0, 1)[0].flatten(), draws[2 * 12 + 5])


def test_t13_subsets_are_uniform_independent_and_without_replacement():
    candidates = list(range(9))
    chosen = [trained_subset(candidates, 6, 0, 1, sample) for sample in range(3000)]
    assert all(len(set(c)) == 6 and c == sorted(c) and max(c) <= 8 for c in chosen)
    frequency = [sum(s in c for c in chosen) / 3000 for s in candidates]
    assert all(abs(f - 6 / 9) < 0.04 for f in frequency)
    assert len({tuple(c) for c in chosen}) > 60
    assert trained_subset(candidates, 6, 0, 1, 5) == chosen[5]


def test_permutation_is_one():
    assert sorted(permutation(10, 1)) == list(range(10)) and permutation(10, 1) != permutation(10, 2)
