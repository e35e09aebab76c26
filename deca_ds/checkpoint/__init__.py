"""The trained model on disk: sharded state as the ranks write it, and its export as a Hugging Face directory."""
