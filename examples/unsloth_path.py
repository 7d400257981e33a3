"""unsloth-zoo's FastMLXModel and MLXTrainer as a path, watched from outside."""

import os

from parity import plugin

os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")  # it looks for one on Linux


def run(path, rows, out, batches, steps, accumulation, batch_size, lr, betas, eps, weight_decay, rank, alpha,
        dropout, target_modules, max_length, gradient_checkpointing, seed, compile=True):  # fmt: skip
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig
    from unsloth_zoo.mlx.utils import FiniteTextBatchPlan

    model, tokenizer = FastMLXModel.from_pretrained(
        path, max_seq_length=max_length, dtype="float32", load_in_4bit=False, text_only=True)  # fmt: skip
    FastMLXModel.get_peft_model(
        model, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules),
        use_gradient_checkpointing=gradient_checkpointing, max_seq_length=max_length, random_state=seed,
        finetune_last_n_layers=None)  # fmt: skip
    options = MLXTrainingConfig(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=steps,
        num_train_epochs=-1, learning_rate=lr, lr_scheduler_type="constant", warmup_steps=0, optim="adamw",
        adam_beta1=betas[0], adam_beta2=betas[1], adam_epsilon=eps, weight_decay=weight_decay, seed=seed,
        max_grad_norm=0.0, max_grad_value=0.0, max_seq_length=max_length, use_cce=False, compile=compile,
        gradient_checkpointing=gradient_checkpointing, logging_steps=1, save_steps=0, eval_steps=0,
        output_dir=out, report_to="none")  # fmt: skip
    trainer = MLXTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=options)
    if batches is not None:
        trainer._batches = ready(batches, steps * accumulation, FiniteTextBatchPlan)
    trainer.train()
    trainer.save_model(out)


def ready(batches, count, plan):
    """Batches that are trained on as they are: it compiles for a plan of its own only."""
    from unsloth_zoo.mlx.utils import _FiniteTextRow

    drawn = [batch for batch, _ in zip(batches, range(count), strict=False)]
    made = type("Plan", (plan,), {"materialize": lambda _, n, phase=None: (*drawn[int(n)], None)})
    rows = [_FiniteTextRow(tuple(r[: s[1]]), s[0])
            for ids, spans in drawn for r, s in zip(ids.tolist(), spans.tolist(), strict=True)]  # fmt: skip
    size, widths = len(drawn[0][0]), [ids.shape[1] for ids, _ in drawn]
    order = [range(n * size, (n + 1) * size) for n in range(count)]
    return made(rows, order, max_seq_length=max(widths), pad_id=0, widths=widths)


Unsloth = plugin.from_trainer(run, name="unsloth-outside", packages=("unsloth-zoo",))
