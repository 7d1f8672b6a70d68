"""The DeepSeek decoder, and its weights in the Hugging Face layout."""
