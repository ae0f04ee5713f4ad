"""The device side of a finetuning job, without the model: data order, master weights, optimizer, checkpoints, events.

Nothing here runs attention or knows an architecture; the engine hands in gradients and asks for the next rows.
"""
