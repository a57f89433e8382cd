"""Training: the loop, its step, schedules, optimizer, checkpoints and progress."""
