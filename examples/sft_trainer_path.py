"""TRL's SFTTrainer as a path, watched from outside."""

from parity import plugin


def run(path, rows, out, steps, accumulation, batch_size, lr, weight_decay, rank, alpha, seed):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(
        out, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", seed=seed,
        max_steps=steps, gradient_accumulation_steps=accumulation, logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=batch_size, learning_rate=lr, weight_decay=weight_decay,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", optim="adamw_torch",
        model_init_kwargs={"dtype": torch.float32, "attn_implementation": "eager", "device_map": None})  # fmt: skip
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(path, options, train_dataset=Dataset.from_list(rows), peft_config=lora)
    trainer.train()
    trainer.save_model(out)


Sft = plugin.from_trainer(run, name="sft", packages=("trl",), framework="torch")
