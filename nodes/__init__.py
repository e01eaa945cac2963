"""The ComfyUI nodes and the MODEL they hand out. The only folder that knows ComfyUI."""
