"""The operations the engine runs on tokens, one folder an operation, each with a plain-torch reference."""
