"""Adapters on disk: PEFT LoRA folders and router files, read and written without torch.

    lora_config.py       adapter_config.json: what is understood, and what is refused by name
    lora_factors.py      an adapter as factors, D = scale * B A per module, read one module at a time
    base_identity.py     which base an adapter belongs to, by the content of the base's weights
    safetensors_io.py    tensors of a file one by one, bfloat16 included
    adapter_writer.py    a folder that PEFT and vLLM load, there as a whole or not at all
    routers.py           which expert a request belongs to; mlp_router.py is the one that is trained

Letters: R rank, M outputs and N inputs of a module (`B_MR` is [m, r], `A_RN` [r, n], `bias_M` [m]); in routers K
experts, D width of a state, H hidden width, T tokens, N states.
"""
