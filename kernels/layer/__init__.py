"""What a decoder layer does beside products and attention: norms, rotary embedding, gated activations."""
