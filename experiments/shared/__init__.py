"""What experiments share: data, evaluation, a training loop, records, pictures."""
