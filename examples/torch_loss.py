"""A loss as a trainer on torch has it. It knows nothing of mlx-parity."""

from torch.nn.functional import cross_entropy


def loss_fn(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses.mean()
