"""A namespace with one stack in it, `edge`, and a played node."""

import json

from tests.operator.players import PODS, STACKS, TABLES, wait

STACK = {
    "apiVersion": "packetstack.io/v1alpha1",
    "kind": "PacketStack",
    "metadata": {"name": "edge"},
    "spec": {
        "replicas": 2,
        "flowTable": {"buckets": 1024},
        "listeners": [
            {
                "name": "web",
                "address": "192.0.2.10",
                "port": 80,
                "backends": {"endpoints": [{"address": "10.1.0.5", "port": 80}]},
            }
        ],
        "snat": {"addresses": ["192.0.2.64/28"]},
    },
}


class Place:
    """`server`: its API server, asked as an administrator. `node`: its only node, played."""

    def __init__(self, server, namespace, node):
        self.server, self.namespace, self.node = server, namespace, node

    def path(self, kind, name="edge"):
        return f"{kind.format(self.namespace)}/{name}"

    def create(self, **spec):
        body = {**STACK, "spec": {**STACK["spec"], **spec}}
        self.server.request("POST", STACKS.format(self.namespace), body)

    def change(self, **spec):
        self.server.merge(self.path(STACKS), {"spec": spec})

    def stack(self):
        return self.server.get(self.path(STACKS))

    def table(self):
        return self.server.get(self.path(TABLES))

    def condition(self, kind, stack=None):
        stack = stack or self.stack() or {}
        return next((c for c in stack.get("status", {}).get("conditions", ()) if c["type"] == kind), {"status": ""})

    def pods(self):
        return {p["metadata"]["name"]: p for p in self.server.items(PODS.format(self.namespace))}

    def settled(self):
        """The stack is as its resource says, and the operator knows it."""
        stack = self.stack()
        status, generation = stack.get("status", {}), stack["metadata"]["generation"]
        progressing = self.condition("Progressing", stack)
        replicas = stack["spec"]["replicas"]
        return (
            progressing["status"] == "False"
            and progressing["observedGeneration"] == generation
            and status["readyReplicas"] == replicas
            and len(self.pods()) == replicas
        )

    def settle(self, seconds=30):
        try:
            wait(self.settled, seconds)
        except AssertionError:
            shown = json.dumps(self.stack().get("status"), indent=1)
            raise AssertionError(f"not settled: {shown} {sorted(self.pods())}") from None
        assert self.node.broken == []
