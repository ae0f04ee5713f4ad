"""Attention: of inference rows over the paged K/V cache, and of training rows over contiguous keys and values."""
