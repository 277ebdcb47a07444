"""Publishing of an export: its model card, and the push to the Hugging Face Hub."""
