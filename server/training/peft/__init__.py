"""LoRA adapters as parameters and as PEFT folders: which modules, which tensors, how they are read and written."""
