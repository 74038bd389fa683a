"""MTFT: fine-tune one language model on many tasks, and know what to mix, how to weigh it, and what you got."""

__version__ = "0.1.0"
