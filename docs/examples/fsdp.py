"""FSDP2: sharded weights, and the loss of all ranks' rows.

torchrun --nproc-per-node 2 fsdp.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from supcon_kernels import supcon_loss

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

torch.manual_seed(0)  # the same weights and the same order on every rank
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device) / 16
labels = torch.tensor(digits.target, device=device)

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(device)
mesh = init_device_mesh(device, (ranks,))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

losses = []
for batch in torch.randperm(len(images)).split(256)[:-1]:
    mine = batch[rank::ranks]  # a rank's share of the batch
    loss = supcon_loss(model(images[mine]), labels[mine], temperature=0.1, group="world")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights = get_model_state_dict(model, options=whole)  # on rank 0, {} on the others
if rank == 0:
    torch.save({"losses": losses, "model": weights}, "encoder.pt")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
dist.barrier()  # no rank leaves while another still sends or writes
dist.destroy_process_group()
