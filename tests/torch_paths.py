"""Paths on torch made of the functions of a user."""

import torch

from parity import plugin
from tests import torch_functions as functions

Averaged = plugin.from_loss(functions.averaged, framework="torch")
Right = plugin.from_loss(functions.right, framework="torch")
Counting = plugin.from_loss(functions.own_loss, framework="torch")
PaddingToo = plugin.from_loss(functions.padding_too, framework="torch")
NoLoss = plugin.from_loss(functions.no_loss, framework="torch")
Looped = plugin.from_parts(loop=functions.plain_loop, framework="torch")
Batched = plugin.from_parts(batches=functions.padded, name="batched", framework="torch")
Adam = plugin.from_parts(optimizer=torch.optim.AdamW, name="adam", framework="torch")
