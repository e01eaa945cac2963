"""Random faults against a pool and a real ComfyUI: what is drawn, what is done, and what must hold afterwards."""
