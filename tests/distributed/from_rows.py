"""Runs on every rank of test_python_api.py: python from_rows.py MODEL TASKS.JSON FOLDER."""

import json
import sys
from pathlib import Path

from transformers import TrainingArguments

from mtft import MultiTaskTrainer


def run(model, rows, folder, *, batch_size):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=batch_size,
        learning_rate=5e-3,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = MultiTaskTrainer.from_datasets(
        {"path": str(model), "dtype": "fp32"}, rows, shares="uniform", args=args, lora={"r": 4, "alpha": 8}
    )
    trainer.train()
    trainer.save_model(str(Path(folder) / "adapter"))


if __name__ == "__main__":
    run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3], batch_size=4)
