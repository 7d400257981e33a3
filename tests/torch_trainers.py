"""Small trainers on torch, each written as somebody might write it."""

import itertools

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from parity import plugin

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def collate(rows):
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = labels[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prepared(path, texts, seed, rank, scale):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=int(scale * rank), target_modules=EVERY)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in texts]
    return get_peft_model(model, config).train(), rows


def loader(rows, batch_size):
    return DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate)


def by_hand(path, rows, out, steps, lr, rank, scale, batch_size, seed):
    """A loop with a loader, the loss of transformers."""
    model, tokens = prepared(path, rows, seed, rank, scale)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader(tokens, batch_size)))
    for batch in itertools.islice(batches, steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def draw(rows, batch_size):
    while True:
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            batch = collate(rows[start : start + batch_size])
            yield batch["input_ids"], batch["labels"]


def averaging(path, rows, steps, lr, rank, scale, batch_size, seed, accumulation):
    """A loss of its own that averages over padding; a sum of micro-batches, clipped by its norm."""
    model, tokens = prepared(path, rows, seed, rank, scale)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, batches = torch.optim.SGD(trained, lr=lr), draw(tokens, batch_size)
    for _ in range(steps):
        for ids, labels in itertools.islice(batches, accumulation):
            logits = model(input_ids=ids[:, :-1]).logits
            losses = cross_entropy(
                logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
            )
            losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.25)
        optimizer.step()
        optimizer.zero_grad()


def without_backward(path, rows, steps):
    AutoModelForCausalLM.from_pretrained(path)


def tired(path, rows, out, steps, lr, rank, scale, batch_size, seed):
    """Ends after two updates."""
    by_hand(path, rows, out, 2, lr, rank, scale, batch_size, seed)


ByHand = plugin.from_trainer(by_hand, name="by-hand", framework="torch")
Averaging = plugin.from_trainer(averaging, batches=draw, framework="torch")
Without = plugin.from_trainer(without_backward, framework="torch")
Tired = plugin.from_trainer(tired, framework="torch")


def stepping(path, texts, steps, lr, batches, after=lambda model: None):
    """A step for each batch of an iterator."""
    model, _ = prepared(path, texts, 0, 8, 2.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    for batch in itertools.islice(batches, steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(model)


def tokens_of(path, rows):
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(row["text"])["input_ids"] for row in rows]


def from_a_list(path, rows, steps, lr, batch_size):
    """Draws its batches from no loader and by no function that anybody knows."""
    batch = collate(tokens_of(path, rows)[:batch_size])
    stepping(path, rows, steps, lr, itertools.repeat(batch))


def positioned(path, rows, steps, lr, batch_size):
    """Its batches hold positions as well."""

    def with_positions(picked):
        batch = collate(picked)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    made = DataLoader(tokens_of(path, rows), batch_size=batch_size, collate_fn=with_positions)
    stepping(path, rows, steps, lr, itertools.chain.from_iterable(itertools.repeat(made)))


def swapping(path, rows, steps, lr, batch_size):
    """Trains on other rows than its loader gives."""
    made = itertools.chain.from_iterable(
        itertools.repeat(loader(tokens_of(path, rows), batch_size))
    )
    stepping(path, rows, steps, lr, ({**b, "input_ids": b["input_ids"].flip(0)} for b in made))


def decaying(path, rows, steps, lr, batch_size):
    """Decays its weights by hand, beside its optimizer."""

    def decay(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.999)

    made = itertools.chain.from_iterable(
        itertools.repeat(loader(tokens_of(path, rows), batch_size))
    )
    stepping(path, rows, steps, lr, made, decay)


def in_twos(path, rows, steps, lr, rank, scale, batch_size, seed):
    """Always adds two micro-batches up."""
    averaging(path, rows, steps, lr, rank, scale, batch_size, seed, 2)


FromAList = plugin.from_trainer(from_a_list, framework="torch")
Positioned = plugin.from_trainer(positioned, framework="torch")
Swapping = plugin.from_trainer(swapping, framework="torch")
Decaying = plugin.from_trainer(decaying, name="decaying-torch", framework="torch")
InTwos = plugin.from_trainer(in_twos, batches=draw, framework="torch")
