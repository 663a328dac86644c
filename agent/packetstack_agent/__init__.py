"""The node side of PacketStack: director, flow table, arena, engines, handovers, probes, and the local controller."""
