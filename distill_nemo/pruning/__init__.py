"""Cut a smaller model out of a Hugging Face directory: importance from activations, choice, slicing."""
