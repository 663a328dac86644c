"""The Kubernetes side: PacketStack resources become engine pods and flow tables."""
