"""Training: optimizers, schedules, generalization and how models are made to learn."""
