"""The processes that train one network: a single one, or several, each with the same weights and a share of every batch.

Whatever looks at the whole batch asks the team for it; see whole_batch.py. Of several processes Lightning Fabric chooses
the devices, connects them (NCCL on GPUs, gloo on CPUs), averages their gradients and agrees on numbers.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import distributed, nn

from pipeline.errors import TrainingError
from pipeline.whole_batch import whole, with_whole_batch_norm

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_PATIENCE = timedelta(minutes=30)  # for processes that are slow to start, as torch.distributed has it
_Said = TypeVar("_Said")


class Team(Protocol):
    """Process `rank` of `size`, at work on a device. All of them call the same methods, in the same order."""

    rank: int
    size: int
    device: torch.device

    def prepared(self, network: nn.Module) -> nn.Module:
        """The network in the form that this team trains."""

    def learner(self, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """A prepared network's forward pass; a backward pass through it averages gradients over the team."""

    def finished(self, network: nn.Module) -> nn.Module:
        """A network of the prepared form in the form that it had before."""

    def whole(self, share: torch.Tensor) -> torch.Tensor:
        """The batch of which each process gives its share, along the first axis; differentiable."""

    def total(self, counts: np.ndarray) -> np.ndarray:
        """The sum of what each process counted, int64."""

    def first(self, said: _Said) -> _Said:
        """What the first process says."""


class Alone:
    """One process, with a GPU where there is one."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prepared(self, network: nn.Module) -> nn.Module:
        """See Team."""
        return network

    def learner(self, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """See Team; on a GPU it is compiled, if there is a compiler, else run as it is."""
        if self.device.type == "cpu":
            return network
        import torch._dynamo

        torch._dynamo.reset()  # it counts networks that a process has compiled, and runs the ninth as it is
        torch._dynamo.config.suppress_errors = True
        compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network)
        return compiled

    def finished(self, network: nn.Module) -> nn.Module:
        """See Team."""
        return network

    def whole(self, share: torch.Tensor) -> torch.Tensor:
        """See Team."""
        return share

    def total(self, counts: np.ndarray) -> np.ndarray:
        """See Team."""
        return counts

    def first(self, said: _Said) -> _Said:
        """See Team."""
        return said


class FabricTeam:
    """Several processes, started by `processes.together` and joined by Lightning Fabric.

    Raises TrainingError without it, and where some would compute on a GPU and others would not.
    """

    def __init__(self, devices: int, nodes: int, strategy: str) -> None:
        try:
            from lightning_fabric import Fabric
            from lightning_fabric.plugins.environments import LightningEnvironment
        except ModuleNotFoundError as error:
            command = 'python -m pip install --constraint requirements.lock --editable ".[distributed]"'
            found, remedy = f"no Lightning Fabric here ({error})", f"In Fullfield's own folder, `{command}`."
            raise TrainingError("training.devices and training.nodes", found, "Lightning Fabric", remedy) from error
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        rank, size = int(os.environ["RANK"]), devices * nodes
        # At the place at which torch.distributed meets next, whose first process serves both.
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore  # type: ignore[attr-defined]
        self._store: Store = store(*place, size, rank == 0, timeout=_PATIENCE, multi_tenant=True)
        require_alike(self._store, rank, size, kind)
        # Named, since it would take a Dask worker inside a Slurm job for a process that Slurm started.
        environment = LightningEnvironment()
        self._fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy, plugins=[environment])
        self._fabric.launch()
        self.rank, self.size, self.device = self._fabric.global_rank, self._fabric.world_size, self._fabric.device

    def prepared(self, network: nn.Module) -> nn.Module:
        """See Team; its batch norms look at the whole batch."""
        self._plain, learner = network, deepcopy(network)
        if self.device.type == "cuda":
            synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(learner)  # type: ignore[no-untyped-call]
            return synchronised
        return with_whole_batch_norm(learner)

    def learner(self, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """See Team."""
        learner: Callable[[torch.Tensor], torch.Tensor] = self._fabric.setup_module(network)
        return learner

    def finished(self, network: nn.Module) -> nn.Module:
        """See Team."""
        plain = deepcopy(self._plain).to(self.device)
        plain.load_state_dict(network.state_dict())
        return plain

    def whole(self, share: torch.Tensor) -> torch.Tensor:
        """See Team."""
        return whole(share.to(self.device))

    def total(self, counts: np.ndarray) -> np.ndarray:
        """See Team."""
        tensor: torch.Tensor = self._fabric.all_reduce(torch.from_numpy(counts).to(self.device), reduce_op="sum")
        return tensor.cpu().numpy()

    def close(self) -> None:
        """Part, after a training that went well."""
        distributed.destroy_process_group()

    def first(self, said: _Said) -> _Said:
        """See Team."""
        told: _Said = self._fabric.broadcast(said)
        return told


def require_alike(store: Store, rank: int, size: int, kind: str) -> None:
    """Raise TrainingError, in each of so many processes, where they do not all compute on devices of one `kind`.

    Each leaves its own in the store. Those on GPUs and those on processors would wait half an hour for each other.
    """
    store.set(f"device of {rank}", f"{kind} on {platform.node()}")
    found = [store.get(f"device of {other}").decode() for other in range(size)]
    if len({told.partition(" ")[0] for told in found}) > 1:
        remedy = "Start workers where torch finds GPUs only, or hide them everywhere: CUDA_VISIBLE_DEVICES=-1."
        raise TrainingError("training.nodes", ", ".join(sorted({*found})), "cuda on all machines, or on none", remedy)
