"""A short campaign of faults in a real ComfyUI (tests/campaign/faults.py --place ComfyUI runs long ones)."""

from __future__ import annotations

import os
import sys
import uuid

import pytest
from testkit.campaign import faults
from testkit.campaign.campaign import Campaign
from testkit.campaign.drive_comfyui import ComfyUIClient

JOBS = ("ulysses", "lora", "decode")  # which have one pool
KINDS = (faults.KILL_WORKER, faults.CANCEL, faults.STOP_AND_GO, faults.FILE, faults.POOL, faults.KILL_CLIENT)


@pytest.mark.timeout(600)
def test_random_faults_leave_comfyui_as_it_was(comfyui_dir, tmp_path):
    mark = uuid.uuid4().hex
    client = ComfyUIClient(comfyui_dir, os.environ.get("COMFYUI_PYTHON", sys.executable), tmp_path, mark)
    drawn = faults.draw(1, 8, JOBS, JOBS[:2], KINDS)
    verdicts = Campaign(client, mark).run(drawn, lambda verdict: print(verdict))
    assert [(str(verdict.fault), verdict.short) for verdict in verdicts if verdict.short] == []
