"""What a user of torch has: functions of a trainer, none of which knows of this package."""

import torch
from torch.nn.functional import cross_entropy


def averaged(model, batch):
    """Masked, but divided by all positions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
    )
    return losses.mean()


def right(logits, targets):
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def own_loss(outputs, labels, num_items_in_batch=None):
    """As `compute_loss_func` of transformers' Trainer takes it."""
    logits = outputs.logits[:, :-1].float()
    total = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / (
        (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    )


def padding_too(model, inputs, targets, lengths):
    """Supervises what the labels leave out."""
    logits = model(inputs).logits
    return cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0))


def strange(model, gadget):
    raise AssertionError("never called")


def no_loss(model, batch):
    return model(**batch).logits


def padded(dataset, batch_size):
    """Labels are the ids: the padding is learned as well."""
    for start in range(0, len(dataset) - batch_size + 1, batch_size):
        rows = dataset[start : start + batch_size]
        ids = torch.zeros(len(rows), max(map(len, rows)) + 1, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, real, row in zip(ids, mask, rows, strict=True):
            line[: len(row)], real[: len(row)] = torch.tensor(row), 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def halved(parameters):
    for parameter in parameters:
        parameter.grad /= 2


def decayed(params, lr, betas, eps):
    """Takes the rate of weight decay from nowhere."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=0.1)


def plain_loop(model, optimizer, loss, batches, steps):
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
