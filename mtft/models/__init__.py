"""Models and their tokenizers: loading, quantization, LoRA. For training, evaluation and fusion alike.

loading.py     the one loader of models: what is missing from their files, or unused, is refused
adapters.py    the one loader of saved adapters, which are whole and belong to this base
lora.py        a fresh adapter, or a saved one that is trained on; lora_targets.py: on which modules
"""
