"""The pool: one worker process per GPU that runs one Wan DiT together. Never imports ComfyUI.

README.md says which file is for what.
"""
