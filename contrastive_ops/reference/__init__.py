"""The primitives in plain PyTorch, streamed by chunks of rows: the definition of correct."""
