"""What surrounds a training run, one concern a file."""
