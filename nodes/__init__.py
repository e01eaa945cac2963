"""ComfyUI V3 nodes: a schema and a thin execute each. The only folder that knows ComfyUI.

May import distributed/, wanvideo/ and ComfyUI. A package here imports only those before it in this list: common, model,
usp, distrifusion, example. Open extension.py first: it lists the nodes.
"""
