"""Weights on their way to a card, which a stand-in plays: in order, through one buffer, never overwritten in use."""

import torch

from abliterate.model import offload
from abliterate.model.carrying import Carrier, carrier_to
from tests.offloading import all_equal, offloaded, resident, together


class StandIn:
    """A card that copies late: what lies in the buffer when it is asked to wait is what arrives."""

    def __init__(self):
        self.did, self.buffers = [], []

    def pinned(self, size_bytes):
        self.did.append("pin")
        self.buffers.append(torch.full((size_bytes,), 255, dtype=torch.uint8))
        return self.buffers[-1]

    def copied(self, values, dtype):
        self.did.append("copy")
        inside = any(its.data_ptr() <= values.data_ptr() < its.data_ptr() + its.nbytes for its in self.buffers)
        assert inside, "what is no pinned memory is copied by the host"
        there = values.to(dtype, copy=True)
        self.buffers[-1].fill_(255)  # whoever reads the buffer from now on reads nonsense
        return there

    def lend(self, values):
        self.did.append("lend")


def test_a_model_carried_to_a_card_computes_the_same(saved, monkeypatch):
    card = StandIn()
    monkeypatch.setattr(offload, "carrier_to", lambda _: Carrier(card))
    ours = offloaded(saved("llama"), torch.bfloat16)
    ours.offload.device = torch.device(
        "meta"
    )  # anything that is no host: plain tensors are read as stored, and carried
    monkeypatch.setattr(ours.offload, "device", torch.device("cuda"))
    ours.offload._spare.decline()
    found = together(ours)
    monkeypatch.setattr(ours.offload, "device", torch.device("cpu"))
    assert all_equal(found, together(resident(saved("llama"), torch.bfloat16)))
    copies = card.did.count("copy")
    assert copies > 20
    assert [step for step in card.did if step != "pin"] == ["copy", "lend"] * copies
    assert card.did.count("pin") < 6  # the buffer grows a few times, and serves all that come


def test_memory_grows_and_never_twice_at_once():
    card = StandIn()
    carrier = Carrier(card)
    small = carrier.room(10, torch.float32)
    assert carrier.room(4, torch.bfloat16).data_ptr() == small.data_ptr()
    carrier.room(100, torch.float32)
    assert card.did == ["pin", "pin"]
    assert carrier.room(10, torch.float32).data_ptr() != small.data_ptr()


def test_the_host_needs_no_carrier():
    assert carrier_to(torch.device("cpu")) is None
