"""The backends of listeners: Services and their EndpointSlices become endpoints. Pure."""

from ipaddress import ip_address

from pydantic import ValidationError

from packetstack_core.limits import MAX_BACKENDS
from packetstack_core.resources import Endpoint, Listener, PacketStack, Service
from packetstack_operator.observing import World


def resolve(stack: PacketStack, world: World) -> tuple[tuple[Listener, ...], list[str]]:
    """The listeners with endpoints in the place of services, and what is wrong with the services."""
    own = set(stack.virtual_addresses())
    networks = stack.spec.snat.addresses
    listeners, problems = [], []
    left = MAX_BACKENDS - sum(len(li.backends.endpoints or ()) for li in stack.spec.listeners)
    for listener in stack.spec.listeners:
        service = listener.backends.service
        if service is None:
            listeners.append(listener)
            continue
        found, problem = _endpoints(listener, service, world)
        usable = [
            e
            for e in found
            if e.address not in own and not any(e.address.version == n.version and e.address in n for n in networks)
        ]
        if len(usable) > left:
            problem = f"service {service.name} has more backends than fit; a stack has at most {MAX_BACKENDS}"
            usable = usable[:left]
        left -= len(usable)
        if problem:
            problems.append(f"listener {listener.name}: {problem}")
        backends = listener.backends.model_copy(update={"service": None, "endpoints": tuple(usable)})
        listeners.append(listener.model_copy(update={"backends": backends}))
    return tuple(listeners), problems


def _endpoints(listener: Listener, service: Service, world: World) -> tuple[list[Endpoint], str]:
    """In order of address and port."""
    ports = world.services.get(service.name)
    if ports is None:
        return [], f"service {service.name} is not there; create it, or name another"
    name = ports.get((service.port, listener.protocol))
    if name is None:
        return [], f"service {service.name} has no {listener.protocol} port {service.port}; use one that it has"
    weights: dict[tuple[str, int], int] = {}
    for part in world.slices.get(service.name, ()):
        if part.family != listener.address.version:
            continue
        numbers = [p for n, protocol, p in part.ports if n == name and protocol == listener.protocol]
        for address, fresh, last in part.endpoints:
            # A flow that lives on a terminating backend stays where it is. UDP has no end that
            # could be waited for, so that its flows would stay until the backend is gone.
            if not fresh and (not last or listener.protocol == "UDP"):
                continue
            for port in numbers:
                weights[address, port] = max(weights.get((address, port), 0), int(fresh))
    endpoints = []
    for (address, port), weight in weights.items():
        try:
            endpoints.append(Endpoint.model_validate({"address": address, "port": port, "weight": weight}))
        except ValidationError:
            continue  # a loopback address, say: nothing that packets could be sent to
    return sorted(endpoints, key=lambda e: (int(ip_address(str(e.address))), e.port)), ""
