"""A folder or a Hub id -> a validated config, tensors, tokenizer, chat template, and the memory that it will take."""
