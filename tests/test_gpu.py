"""What only a GPU can show: its gradients against the CPU's, and SyncBatchNorm in one process."""

import pytest
import torch
from torch.nn import functional as F

from normcourse import default_settings, fit
from normcourse.train import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def gradient(norm, device, dtype):
    """Of the whole network on 64 images."""
    torch.manual_seed(0)
    net = build(default_settings(norm=norm)).to(device, dtype)
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64, device=device) % 10
    F.cross_entropy(net(x.to(device, dtype)), y).backward()
    return torch.cat([p.grad.flatten().cpu().double() for p in net.parameters()])


@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "in", "none"])
def test_the_gradient_is_the_cpus(norm):
    exact, found = gradient(norm, "cpu", torch.float64), gradient(norm, "cuda", torch.float32)
    assert (found - exact).norm() < 1e-3 * exact.norm()


def test_sync_bn_in_one_process_is_batch_norm(small):
    with_sync, without = [
        fit(default_settings(epochs=1, sync_bn=on), small, device="cuda") for on in (True, False)
    ]
    assert with_sync["history"][0]["train_loss"] == without["history"][0]["train_loss"]
