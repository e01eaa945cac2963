"""Attention kernels by name, each tried out before it is used.

May import base/, ops/ and quant/. Open kernels.py first.
"""
