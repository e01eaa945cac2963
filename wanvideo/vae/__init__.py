"""Wan's two video VAEs, decoding and encoding in pieces of frames.

May import base/ and ops/. Open vae_coder.py first.
"""
