"""The Wan DiT and its VAE as single-device code, and the files that they come in.

May import torch and safetensors; nothing of distributed/ or nodes/. A package here imports only those before it in this
list: base, ops, quant, attention, checkpoint, model, variants, vae, example. Open model/model.py first.
"""
