"""Paths made of the functions of a user."""

from parity import plugin
from tests import plugin_functions as functions

Averaged = plugin.from_loss(functions.padding_averaged)
Masked = plugin.from_loss(
    functions.with_mask,
    batch=lambda ids, lengths: (ids[:, :-1], ids[:, 1:], functions.mask(ids, lengths)),
)
Mixed = plugin.from_parts(
    dataset=functions.no_eos, batches=functions.in_order, optimizer=functions.adam, name="mixed"
)
Looped = plugin.from_parts(loop=functions.plain_loop)
