"""What the supervisor is made of: one child and its restarts, and the checks before anything starts."""
