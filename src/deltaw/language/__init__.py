"""Fine-tuning of language models: instruction, dialogue, text and preference data."""
