"""How the Wan DiT is spread over workers: the plan, the processes, what each rank holds, computes and exchanges.

May import wanvideo/, torch.distributed, yunchang, xfuser and distrifuser; never ComfyUI. A package here imports only
those before it in this list: plan, protocol, shm, comm, parallel, weights, planner, approximate, worker, executors,
client. Open client/pool.py first: it is what ComfyUI's side sees.
"""
