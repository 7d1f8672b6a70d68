"""Layers of the DeepSeek architecture on one device."""
