"""Where weights lie: what each device holds, and which layers' routed experts stay in host memory."""

from typing import NamedTuple

import numpy as np

from ..checkpoint import host_split
from ..checkpoint.weight_shapes import ABSORBED, WeightShapes, sum_step_bytes
from ..errors import UsageError, argument
from ..parallel.partition import MeshShape


class Placement(NamedTuple):
    """Bytes of weights.

    weights      on each device: in their formats, and those that `load` dequantizes
    each, whole  of the routed experts of every MoE layer: on each device that has them, and on the host
    host_layers  how many of these layers, from the first, are on the host
    layer        of a layer's experts on the host, as a device is sent them to read a chunk of a prompt
    device_read, host_read  that a step of one row reads, on each device and on the host
    """

    weights: tuple[int, int]
    each: list[int]
    whole: list[int]
    host_layers: int
    layer: int
    device_read: float
    host_read: float

    @property
    def hosted(self) -> int:
        """The bytes on the host."""
        return sum(self.whole[: self.host_layers])

    @property
    def sent(self) -> int:
        """The bytes that a device is sent at a time."""
        return self.layer if self.host_layers else 0

    def find_split(self, total: int, free: int, host_free: int) -> int | None:
        """Return the fewest layers on the host with which devices and host have room, None if there are none, if a
        device needs `total` bytes now."""
        most = total - self.sent + sum(self.each[: self.host_layers])
        counts = range(len(self.each) + 1)
        needs = ((most - sum(self.each[:n]) + (n > 0) * self.layer, sum(self.whole[:n])) for n in counts)
        return next((n for n, (device, host) in enumerate(needs) if device <= free and host <= host_free), None)


def place(shapes: WeightShapes, mesh: MeshShape, compute: np.dtype, experts: str, free: int, on_cpu: bool) -> Placement:
    """Return where `load` puts weights with `experts`, on devices with `free` bytes each. Raises UsageError if they are
    CPUs, whose memory is the host's, CapacityError if the mesh does not divide the model."""
    sizes, full = shapes.count_device_bytes(mesh, compute), shapes.count_device_bytes({}, compute)
    each, whole = (host_split.measure_layers(shapes.cfg, shapes.table, some) for some in (sizes, full))
    count = host_split.parse(experts, len(each))
    if on_cpu and count != 0:
        raise UsageError(
            f"{argument('experts', experts)} is for devices with memory of their own; a CPU's is the host's. Say how "
            f"much they have: {argument('device_memory', '80GB')}"
        )
    if count is None:
        count = host_split.count_layers(sum(sizes.values()), each, host_split.WEIGHT_SHARE * free)
    host_layers = len(each) if count is None else count
    on_host = set(host_split.list_experts(shapes.cfg, shapes.table, 0, host_layers))
    held = {path: size for path, size in sizes.items() if path not in on_host}
    dequantized = sum(size for path, size in held.items() if path.endswith(ABSORBED))
    share = shapes.cfg.num_experts_per_tok / shapes.cfg.n_routed_experts
    return Placement(
        (sum(held.values()) - dequantized, dequantized),
        each,
        whole,
        host_layers,
        max(whole, default=0) // mesh.get("expert", 1),
        sum_step_bytes(shapes.table, held, share),
        sum_step_bytes(shapes.table, {path: full[path] for path in on_host}, share),
    )
