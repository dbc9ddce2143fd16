"""From the published checkpoints to Hugging Face folders."""
