"""`spec.engine` of a stack: the shape of one engine."""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from packetstack_core.limits import (
    MAX_CORES,
    MAX_QUEUES,
)
from packetstack_core.values import (
    DNS_NAME,
    PRINTABLE,
    QUALIFIED_NAME,
    Items,
    Labels,
    Model,
    Opaque,
    Size,
    Whole,
    exactly_one,
    quantity,
)


class DevicePlugin(Model):
    """A virtual function that a Kubernetes device plugin hands out."""

    resource_name: Annotated[str, QUALIFIED_NAME]
    """Resource of the device plugin that the pod asks for, for example "intel.com/sriov_vf"."""
    network_attachment_definition: Annotated[str, QUALIFIED_NAME]
    """NetworkAttachmentDefinition that makes the device an interface of the pod: `name`, or `namespace/name`."""


class ResourceClaim(Model):
    """A virtual function by dynamic resource allocation."""

    resource_claim_template_name: Annotated[str, DNS_NAME]
    """Name of a ResourceClaimTemplate in the stack's namespace."""


class Attachment(Model):
    """An interface that any CNI plugin makes; no device to allocate."""

    network_attachment_definition: Annotated[str, QUALIFIED_NAME]
    """NetworkAttachmentDefinition that makes the interface: `name`, or `namespace/name`."""


class Veth(Model):
    """A veth pair that the agent makes."""


class Interface(Model):
    """What the engine takes packets from: exactly one kind."""

    device_plugin: DevicePlugin | None = None
    resource_claim: ResourceClaim | None = None
    attachment: Attachment | None = None
    veth: Veth | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        exactly_one(self, "device_plugin", "resource_claim", "attachment", "veth")
        return self


class HugePages(Model):
    """Huge pages of an engine."""

    page_size: Literal["2Mi", "1Gi"] = "2Mi"
    """Size of one page."""
    size: Size
    """Memory in all pages together; a multiple of `pageSize`."""

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if quantity(self.size) % quantity(self.page_size):
            raise ValueError(f'has size "{self.size}"; use a multiple of pageSize {self.page_size}')
        return self


class TemplateMetadata(Model):
    """Labels and annotations that every engine pod gets."""

    labels: Labels = Field(default_factory=dict)
    """Labels of the pods, beside PacketStack's own."""
    annotations: Labels = Field(default_factory=dict)
    """Annotations of the pods, beside PacketStack's own."""


class PodTemplate(Model):
    """Where engine pods may run. Without Kubernetes it has no effect."""

    metadata: TemplateMetadata = TemplateMetadata()
    """Labels and annotations that every engine pod gets."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have, as `spec.nodeSelector` of a pod."""
    tolerations: Items[Opaque] = ()
    """Taints of nodes that engines tolerate, as `spec.tolerations` of a pod."""
    affinity: Opaque = Field(default_factory=dict)
    """Nodes and pods that engines prefer or avoid, as `spec.affinity` of a pod."""
    topology_spread_constraints: Items[Opaque] = ()
    """How engines are spread, as `spec.topologySpreadConstraints` of a pod. All engines of a stack run on one node."""
    priority_class_name: Annotated[str, DNS_NAME] | None = None
    """Name of the engines' PriorityClass."""
    service_account_name: Annotated[str, DNS_NAME] | None = None
    """Name of the engines' ServiceAccount; no token is mounted."""


class Engine(Model):
    """The shape of one engine."""

    mode: Literal["AFXDP", "DPDK"] = "AFXDP"
    """How packets reach user space. It cannot change later. `DPDK` is not built yet."""
    image: Annotated[str, PRINTABLE] | None = None
    """Image of the engines' containers. Absent: the operator's own."""
    cores: Annotated[int, Whole(1, MAX_CORES, "a number of cores")] = 1
    """Worker threads of an engine; each serves receive queues of its own."""
    cpu_policy: Literal["Exclusive", "Shared"] = "Shared"
    """`Exclusive`: each core has a CPU of its own, and polls before it sleeps. `Shared`: cores share CPUs, and sleep
    when idle."""
    queues_per_core: Annotated[int, Whole(1, MAX_QUEUES, "a number of queues")] = 4
    """Receive queues of each core; with `cores` at most 64 in all."""
    memory: Size = "512Mi"
    """Limit of the engine's processes, as a quantity; rings and flows are in the agent's memory."""
    huge_pages: HugePages | None = None
    """Huge pages that an engine gets. Absent: none."""
    interface: Interface = Interface(veth=Veth())
    """What the engine takes packets from: exactly one kind. Absent: a veth pair."""
    pod_template: PodTemplate = PodTemplate()
    """Where engine pods may run, and their labels. Without Kubernetes it has no effect."""

    @model_validator(mode="after")
    def _queues_fit(self) -> Self:
        if self.queues > MAX_QUEUES:
            raise ValueError(
                f"has {self.cores} cores x {self.queues_per_core} queuesPerCore = {self.queues} queues; "
                f"use at most {MAX_QUEUES}"
            )
        return self

    @property
    def queues(self) -> int:
        """Receive queues of an engine."""
        return self.cores * self.queues_per_core

    @property
    def memory_bytes(self) -> int:
        """Memory limit of an engine, in bytes."""
        return int(quantity(self.memory))

    def template_hash(self) -> str:
        """Ten hexadecimal digits that differ when engines must be replaced."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]
