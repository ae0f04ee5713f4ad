"""From a tenant's data set and a model's tokenizer to token rows with labels; and the tokenizer itself."""
