"""Fine-tuning in stages: data, batches, losses, and a `transformers.Trainer` that runs them."""
