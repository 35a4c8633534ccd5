"""Memory of released weights is used again, and never more of it is held than was released last."""

import torch

from abliterate.model.spare import Spare
from abliterate.model.stored import SMALL_BYTES
from tests.offloading import all_equal, batches, load, logits, offloaded, together

BYTES = 2 * SMALL_BYTES


def test_a_piece_of_the_same_size_is_used_again():
    spare = Spare()
    first = spare.room(BYTES // 4, torch.float32)
    place = first.data_ptr()
    spare.keep([first.view(8, -1)])
    assert spare.room(BYTES // 4, torch.float32).data_ptr() != place  # nothing was offered yet
    with spare.offered():
        again = spare.room(BYTES // 2, torch.bfloat16)
        assert (again.data_ptr(), again.dtype, again.shape) == (place, torch.bfloat16, (BYTES // 2,))
        assert spare.room(BYTES // 2, torch.bfloat16).data_ptr() != place


def test_what_is_asked_for_in_vain_lets_all_go():
    spare = Spare()
    spare.keep([spare.room(BYTES, torch.uint8), spare.room(3 * BYTES, torch.uint8)])
    assert spare.held_bytes == 4 * BYTES
    with spare.offered():
        spare.room(5, torch.uint8)  # small things come from elsewhere
        assert spare.held_bytes == 4 * BYTES
        spare.keep([torch.empty(BYTES, dtype=torch.uint8)])  # what is released meanwhile is for the next one
        spare.room(2 * BYTES, torch.uint8)
        assert spare.held_bytes == BYTES
    with spare.offered():
        assert spare.held_bytes == BYTES
    assert spare.held_bytes == 0


def test_small_and_strided_tensors_are_not_kept():
    spare = Spare()
    spare.keep([torch.empty(5), torch.empty(BYTES, 2).T])
    assert spare.held_bytes == 0


def test_blocks_take_the_memory_of_the_last_but_one(saved, monkeypatch):
    """The same bits, in two sets of buffers; none is left behind."""
    monkeypatch.setattr("abliterate.model.spare.SMALL_BYTES", 64)
    monkeypatch.setattr("abliterate.model.stored.SMALL_BYTES", 64)
    whole, ours = load(saved("llama")), offloaded(saved("llama"))
    taken = []
    plain = Spare.room
    monkeypatch.setattr(Spare, "room", lambda its, *asked: taken.append(made := plain(its, *asked)) or made)
    expected = [logits(whole, *batch) for batch in batches()]
    assert all_equal(together(ours), expected)
    assert all_equal(together(ours), expected)
    places = [its.data_ptr() for its in taken if its.nbytes >= 64]
    assert len(set(places)) < 0.9 * len(places)  # of three blocks the third takes the memory of the first
    assert ours.offload._spare.held_bytes == 0
