"""Model families, as Hugging Face configurations describe them."""
