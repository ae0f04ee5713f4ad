"""The tables of benchmarks/gpu.py, one module each, and what they share: torch, transformers and peft, no HTTP."""
