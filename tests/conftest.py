"""What every test shares: threads that do not spin, property tests that are the same each time, however busy it is."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import hypothesis  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on CPU tensors

hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ours")
