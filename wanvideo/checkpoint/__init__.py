"""Files: headers of safetensors, GGUF and diffusers folders, and the weights behind them.

May import base/, ops/, quant/ and attention/. Open header.py first.
"""
