"""The process that owns the device: it runs every token, of generation and of training."""
