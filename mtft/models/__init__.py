"""Models and their tokenizers: loading, quantization, LoRA. For training, evaluation and fusion alike."""
