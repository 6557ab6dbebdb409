"""What formats learn from data: second moments, replayed blocks, error feedback."""
