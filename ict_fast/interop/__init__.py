"""Weights in and out: OpenAI's and EDM's files, safetensors with a card, diffusers."""
