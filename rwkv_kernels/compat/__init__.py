"""Drop-ins for the code that RWKV-4 and Vision-RWKV run on today, one module for each origin.

Each has the original's names, signatures, shapes and return values, says which sign of the decay and which layout of
the state it speaks, and converts states to this package's layout (`import_state`) and back (`export_state`); where the
original has a state of the whole model, `import_model_state` and `export_model_state` do that for `nn.RWKVState`.

    transformers  patch() puts the operator into Hugging Face's RwkvModel
    blinkdl       RWKV-LM's RUN_CUDA and WKV, and the state of its recurrent mode
    infctx        RWKV-infctx-trainer's call with a state
    fla           flash-linear-attention's fused_recurrent_rwkv4
    rwkv_pip      the rwkv package's cuda_wkv, and its list of states
    vision_rwkv   Vision-RWKV's RUN_CUDA, bidirectional, and the numbers of its published kernel
    hub           what transformers calls where Hugging Face's `kernels` loads this package
    torchscript   how the two of them that are called from TorchScript, infctx and rwkv_pip, reach the operator

The modules import nothing of their originals, but for `transformers`, which imports it when it is patched.
"""
