import numpy as np
import pytest

from maxscale.data import permutation


def whole(size, key=1, epoch=0):
  return permutation.permute(np.arange(size), size, key, np.full(size, epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 64, 65, 1000, 4096, 4097, 65537])
def test_is_a_bijection(size):
  for epoch in range(3):
    assert np.array_equal(np.sort(whole(size, epoch=epoch)), np.arange(size))


def test_key_and_epoch_change_the_order_and_nothing_else_does():
  base = whole(1000)
  assert np.array_equal(base, whole(1000))
  assert not np.array_equal(base, whole(1000, key=2))
  assert not np.array_equal(base, whole(1000, epoch=1))


def test_each_index_is_computed_alone():
  index, epochs = np.array([5, 999, 5, 0]), np.array([0, 3, 2, 1])
  got = permutation.permute(index, 1000, 1, epochs)
  assert got.tolist() == [whole(1000, epoch=e)[i] for i, e in zip(index, epochs)]


def test_huge_sizes_stay_inside_and_distinct():
  size = 2**40 + 12345
  got = permutation.permute(np.arange(10_000), size, 7, np.zeros(10_000))
  assert got.min() >= 0 and got.max() < size
  assert len(np.unique(got)) == 10_000


@pytest.mark.parametrize("size", [10, 1000])
def test_places_are_uniform_over_epochs(size):
  n = 20_000
  for index in (0, 1, size - 1):
    place = permutation.permute(np.full(n, index), size, 3, np.arange(n)) * 10 // size
    expected = n / 10
    chi2 = ((np.bincount(place, minlength=10) - expected) ** 2 / expected).sum()
    assert chi2 < 40  # 9 degrees of freedom: 1e-5


def test_neighbours_are_scattered():
  order = whole(10_000)
  assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
