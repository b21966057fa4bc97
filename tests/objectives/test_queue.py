"""The key queue: a ring that can forget, and a state that safetensors can hold."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from distunlearn.errors import ConfigError, NumericsError
from distunlearn.objectives.memory_bank import bank_infonce, normalise
from distunlearn.objectives.queue import EMPTY_ID, KeyQueue

D = 3


def keys_for(ids: torch.Tensor) -> torch.Tensor:
    """Key of image i: recognisable, so that a slot shows whose it is."""
    return normalise(torch.stack([ids.float() + 1, torch.ones(len(ids)), -ids.float()], dim=1))


def pushed(size: int, *batches: list[int]) -> KeyQueue:
    queue = KeyQueue(size, D)
    for batch in batches:
        ids = torch.tensor(batch)
        queue.push(keys_for(ids), ids)
    return queue


def test_a_new_queue_is_empty_and_masked():
    queue = KeyQueue(4, D)
    assert queue.valid.sum() == 0 and queue.ids.tolist() == [EMPTY_ID] * 4
    u = normalise(torch.ones(2, D))
    assert bank_infonce(u, u, queue.bank(0.2), torch.tensor([1, 2])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("batches", [[[0, 1, 2]], [[0, 1, 2], [3, 4, 5]], [list(range(13))], [[0], list(range(1, 12))]])
def test_it_holds_the_newest_keys_like_a_plain_list(batches):
    size = 5
    queue = pushed(size, *batches)
    ring = [EMPTY_ID] * size
    for position, value in enumerate(v for batch in batches for v in batch):
        ring[position % size] = value
    assert queue.ids.tolist() == ring
    assert queue.pointer == sum(map(len, batches)) % size
    held = queue.ids[queue.valid]
    torch.testing.assert_close(queue.keys[queue.valid], keys_for(held))


def test_purge_empties_every_key_of_an_image_and_nothing_else():
    queue = pushed(6, [1, 2, 1, 3])
    assert queue.purge(torch.tensor([1, 99])) == 2
    assert queue.ids.tolist() == [EMPTY_ID, 2, EMPTY_ID, 3, EMPTY_ID, EMPTY_ID]
    assert queue.valid.tolist() == [False, True, False, True, False, False]
    assert float(queue.keys[~queue.valid].abs().max()) == 0.0
    assert queue.purge(torch.tensor([1])) == 0 and queue.purge(torch.zeros(0, dtype=torch.int64)) == 0


def test_a_purged_queue_equals_one_that_never_saw_the_image():
    u_a, u_b = normalise(torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0)))
    purged, clean = pushed(6, [1, 2, 1, 3]), pushed(6, [2, 3])
    before = bank_infonce(u_a, u_b, purged.bank(0.2))
    purged.purge(torch.tensor([1]))
    after = bank_infonce(u_a, u_b, purged.bank(0.2))
    torch.testing.assert_close(after, bank_infonce(u_a, u_b, clean.bank(0.2)))
    assert not torch.allclose(before, after)


def test_purged_slots_are_written_again_in_ring_order():
    queue = pushed(4, [1, 2, 3])
    queue.purge(torch.tensor([2]))
    queue.push(keys_for(torch.tensor([4, 5, 6])), torch.tensor([4, 5, 6]))
    assert queue.ids.tolist() == [5, 6, 3, 4] and queue.valid.sum() == 4


def test_an_id_equal_to_the_empty_mark_is_still_an_image():
    queue = pushed(3, [EMPTY_ID])
    assert queue.valid.sum() == 1 and queue.purge(torch.tensor([EMPTY_ID])) == 1 and queue.valid.sum() == 0


def test_the_bank_is_a_snapshot():
    queue = pushed(3, [1])
    bank = queue.bank(0.2)
    queue.push(keys_for(torch.tensor([2, 3, 4])), torch.tensor([2, 3, 4]))
    assert bank.ids.tolist() == [1, EMPTY_ID, EMPTY_ID] and bank.valid.tolist() == [True, False, False]


def test_state_survives_safetensors_and_continues_alike(tmp_path):
    queue = pushed(5, [1, 2, 3, 4])
    queue.purge(torch.tensor([3]))
    save_file(queue.state_dict(), tmp_path / "queue.safetensors")
    restored = KeyQueue(5, D)
    restored.load_state_dict(load_file(tmp_path / "queue.safetensors"))
    for one in (queue, restored):
        one.push(keys_for(torch.tensor([8, 9])), torch.tensor([8, 9]))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_the_state_is_a_copy():
    queue = pushed(3, [1])
    state = queue.state_dict()
    queue.purge(torch.tensor([1]))
    assert state["valid"].tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(4, D)}, ConfigError, r"\(4, 3\).*objective.queue_size"),
        ({"ids": None}, ConfigError, "nothing as 'ids'"),
        ({"valid": torch.zeros(3)}, ConfigError, "'valid'"),
        ({"pointer": torch.tensor(3)}, ConfigError, "slot 3"),
        ({"keys": torch.full((3, D), float("nan"))}, NumericsError, "not finite"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, error, message):
    queue = pushed(3, [1, 2])
    before = queue.state_dict()
    state = {name: value for name, value in {**pushed(3, [7]).state_dict(), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        queue.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())
