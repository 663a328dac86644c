"""How many engines a load asks for: the algorithm of `autoscaling/v2`, as pure functions.

The autoscaler gives what the HorizontalPodAutoscaler of Kubernetes 1.36 gives, bit for bit: replica counts, conditions,
reasons, messages and events. Sources: kubernetes/kubernetes `pkg/controller/podautoscaler` and
`pkg/apis/autoscaling/v2/defaults.go`; each module names the file
that it follows. `options` is what PacketStack adds; `rounds` is the autoscaler of one stack, as operator and local
runtime run it.
"""
